"""Adapters in a conversion: those of a run's layers and those of `peft`'s modules are joined by the family's table.

One of their modules may hold several layers of ours side by side (GPT-2's c_attn, Phi-3's qkv_proj). Its one A serves
them all, so each of ours starts with a copy. The way back stacks those that have parted from one another,

    A' = [A_q; A_k; A_v],   B' = [[B_q, 0, 0], [0, B_k, 0], [0, 0, B_v]],

of three times the rank and with the same scale: exactly the same product.
"""

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from llm_jax.config import Config, LoraConfig
from llm_jax.convert import peft
from llm_jax.convert.peft import Adapter, Part, Written
from llm_jax.convert.rules import Move, Slot, Transform
from llm_jax.convert.source import Source
from llm_jax.errors import DataError, UserError
from llm_jax.models import lora

Read = Callable[[str, tuple[int, ...]], np.ndarray]  # a parameter's path and index to its numbers
Pair = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of theirs that may have an adapter: a weight, and the layers of ours that it holds.

    Attributes:
      conv: its weight is (in, out).
    """

    name: str
    layers: tuple[Slot, ...]  # of their kernels
    transform: Transform
    conv: bool

    @property
    def inputs(self) -> int:
        return self.layers[0].shape[0]

    @property
    def widths(self) -> list[int]:
        return [slot.shape[1] for slot in self.layers]

    def to_ours(self, b: np.ndarray) -> Sequence[np.ndarray]:
        """Their B (out, rank) as each of our layers' B (rank, out)."""
        return self.transform.to_ours([b.T if self.conv else b])

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Our layers' B (rank, out) as their B (out, rank)."""
        found = self.transform.to_theirs(ours)[0]
        return found.T if self.conv else found


def modules_of(moves: Sequence[Move]) -> dict[str, Module]:
    """Their modules by name: the weights of linear layers, of which one tensor is one or several kernels of ours."""
    found = {}
    for move in moves:
        is_linear = all(slot.path.endswith("/kernel") and len(slot.shape) == 2 for slot in move.ours)
        if not is_linear or len(move.theirs) != 1 or not move.theirs[0].endswith(".weight"):
            continue
        slots = move.ours
        way = outputs_alone(move.transform, slots[0].shape[0], tuple(slot.shape[1] for slot in slots))
        if way:
            name = move.theirs[0].removesuffix(".weight")
            found[name] = Module(name, slots, move.transform, way == "conv")
    return found


@functools.lru_cache
def outputs_alone(transform: Transform, inputs: int, widths: tuple[int, ...]) -> str:
    """How a table's transform takes matrices u v^T: "linear" where theirs is v' u^T, "conv" where it is u v'^T, with
    some order v' of the outputs; "" where the inputs change too, and an A could not stay as it is.
    """
    u = np.arange(min(inputs, 3), dtype=np.float32)[:, None] + 1  # the rows of inputs: a few stand for all
    if [len(shape) for shape in transform.their_shapes([(len(u), width) for width in widths])] != [2]:
        return ""
    v = [np.arange(width, dtype=np.float32)[None] + 1 for width in widths]
    try:
        whole, outputs = transform.to_theirs([u @ part for part in v])[0], transform.to_theirs(v)[0]
    except ValueError:  # it counts on the number of inputs
        return ""
    for way, expected in (("linear", outputs.reshape(-1, 1) @ u.T), ("conv", u @ outputs.reshape(1, -1))):
        if whole.shape == expected.shape and np.array_equal(whole, expected):
            return way
    return ""


# ----------------------------------------------------------------------------------------------- from a run


def write(
    folder: Path,
    moves: Sequence[Move],
    layers: Collection[str],
    read: Read,
    cfg: LoraConfig,
    dtype: np.dtype,
    base: str | None,
) -> None:
    """Write a run's adapters as `peft` reads them.

    Args:
      layers: those with an adapter.
      read: of the run's parameters.
      base: name or path of the model that they change, where it is known.

    Raises UserError where the family holds an adapted layer in a way that knows no adapter.
    """
    modules = modules_of(moves)
    adapted = {
        name: module for name, module in modules.items() if any(layer_of(slot) in layers for slot in module.layers)
    }
    lost = set(layers) - {layer_of(slot) for module in adapted.values() for slot in module.layers}
    if lost:
        theirs = next(move.theirs[0] for move in moves for slot in move.ours if layer_of(slot) in lost)
        reason = f"the layer {min(lost)} has an adapter, and {theirs} can have none"
        raise UserError(f"--adapter: {reason}; leave --adapter out for the model with its adapters merged")

    def pair(slot: Slot) -> Pair | None:
        layer = layer_of(slot)
        if layer not in layers:
            return None
        return read(f"{layer}/{lora.A}", slot.index), read(f"{layer}/{lora.B}", slot.index)

    pairs = {name: [pair(slot) for slot in module.layers] for name, module in adapted.items()}
    shared = all(map(_one_a, pairs.values()))
    joined = {name: _joined(adapted[name], found, cfg.rank, shared) for name, found in pairs.items()}
    written = [Written(name, a.shape[0], a.shape[1], b.shape[0]) for name, (a, b) in joined.items()]
    conv = any(module.conv for module in adapted.values())
    config = peft.config_of(cfg, written, list(modules), base, conv=conv)
    peft.write(folder, written, lambda module: joined[module.module], config, dtype)


def layer_of(slot: Slot) -> str:
    return slot.path.rpartition("/")[0]


def _one_a(pairs: Sequence[Pair | None]) -> bool:
    first, *others = [pair[0] for pair in pairs if pair is not None]
    return all(np.array_equal(first, other) for other in others)


def _joined(module: Module, pairs: Sequence[Pair | None], rank: int, shared: bool) -> Pair:
    """A (rank', in) and B (out, rank') of their module, rank' that of all its adapted layers together, or of one."""
    there = [pair for pair in pairs if pair is not None]
    count = 1 if shared else len(there)
    a = np.concatenate([a.T for a, _ in there[:count]])
    ours, number = [], 0
    for pair, width in zip(pairs, module.widths, strict=True):
        wide = np.zeros((count * rank, width), there[0][1].dtype)
        if pair is not None:
            at = 0 if shared else number * rank
            wide[at : at + rank] = pair[1]
            number += 1
        ours.append(wide)
    return a, module.to_theirs(ours)


# ------------------------------------------------------------------------------------------------- to a run


def fitted(found: Source, given: Adapter, *, merge: bool) -> Source:
    """The source, its head untied where the adapter is merged and changes head or embedding.

    Raises UserError where it changes one of them and is to stay an adapter.
    """
    outer = [name.removesuffix(".weight") for name in (found.family.embedding, found.family.head)]
    changed = [name for name in outer if name in given.parts]
    if changed and not merge:
        raise UserError(f"the adapter changes {changed[0]}, and ours are on the blocks' layers alone; give --merge")
    if not changed or not found.cfg.tie_embeddings:
        return found
    print(f"note: the adapter changes {changed[0]}, so the head is no longer tied to the embedding", file=sys.stderr)
    return dataclasses.replace(found, cfg=dataclasses.replace(found.cfg, tie_embeddings=False), untied=True)


def joined(cfg: Config, found: Source, given: Adapter, moves: Sequence[Move], *, merge: bool) -> Config:
    """The run's config, with `model.lora` where the adapter stays one.

    Raises UserError where the model has no such module, or our adapters cannot say it.
    """
    check_modules(given, moves, found.family.embedding.removesuffix(".weight"))
    if given.values.get("lora_dropout"):
        told = f"its lora_dropout of {given.values['lora_dropout']:g} is left out: ours have none"
        print(f"note: {told}, which shows in training alone", file=sys.stderr)
    if merge:
        return cfg
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, lora=config_of(given, moves)))


def check_modules(adapter: Adapter, moves: Sequence[Move], table: str) -> None:
    """Refuse an adapter of a module that the model has not, or of other sizes. `table`: the embedding's module.

    Raises UserError, with module and file.
    """
    modules, file = modules_of(moves), adapter.folder / peft.TENSORS
    if adapter.values.get("fan_in_fan_out") and not any(module.conv for module in modules.values()):
        raise UserError(f"{adapter.folder / peft.CONFIG}: fan_in_fan_out = true: this model's weights are (out, in)")
    shapes = {name: shape for move in moves for name, shape in zip(move.theirs, move.their_shapes, strict=True)}
    for name, part in adapter.parts.items():
        if part.is_table != (name == table) or not part.is_table and name not in modules:
            raise DataError(f"{file}: the module {name} has an adapter, and no layer of the model can have this one")
        sizes, conv = (part.b.shape[0], part.a.shape[1]), name in modules and modules[name].conv
        weight = shapes[f"{name}.weight"]
        if (sizes[::-1] if part.is_table or conv else sizes) != weight:
            raise DataError(f"{file}: A and B of the module {name} are of {list(sizes)}, its weight of {list(weight)}")


def config_of(adapter: Adapter, moves: Sequence[Move]) -> LoraConfig:
    """`model.lora` for an adapter that stays one. Raises UserError where it cannot be said."""
    modules = modules_of(moves)
    count = lambda names: Counter(layer_of(slot) for name in names for slot in modules[name].layers)  # noqa: E731
    found, every = count(adapter.parts), count(modules)
    names = {layer.rpartition("/")[2] for layer in found}
    for layer, number in every.items():
        if layer.rpartition("/")[2] in names and found[layer] != number:
            raise UserError(
                f"the adapter changes {found[layer]} of the {number} layers {layer}, and ours have adapters in all of "
                "a name; give --merge"
            )
    return dataclasses.replace(peft.uniform(adapter), targets=tuple(sorted(names)))


def arrays_of(module: Module, part: Part) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """(path, index, numbers) of A and B of each of our layers that the module holds."""
    a = part.a.read().T
    for slot, b in zip(module.layers, module.to_ours(part.b.read()), strict=True):
        yield f"{layer_of(slot)}/{lora.A}", slot.index, a
        yield f"{layer_of(slot)}/{lora.B}", slot.index, b
