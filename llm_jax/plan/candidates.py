"""Ways to run a config on a machine: meshes, what the backward pass keeps, micro-batches; pruned by arithmetic."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from llm_jax.config import Config, TransformerConfig, check, check_devices
from llm_jax.config.model import GATED
from llm_jax.config.resolve import override
from llm_jax.errors import UserError
from llm_jax.plan.hardware import Topology
from llm_jax.plan.quick import MLP_NAMES, quick_estimate
from llm_jax.plan.setting import Setting, make_setting

Changes = dict[str, object]  # of keys of a config

# What the backward pass finds kept, from the least memory to the most.
QUERIES = ("layer_input", "query", "key", "value")
REMAT: tuple[Changes, ...] = (
    {"model.remat": "full", "model.remat_save": ()},
    {"model.remat": "names", "model.remat_save": QUERIES},
    {"model.remat": "names", "model.remat_save": (*QUERIES, "attention", "attention_output")},
    {"model.remat": "names", "model.remat_save": (*QUERIES, "attention", "attention_output", "mlp_up", "mlp_gate")},
    {"model.remat": "dots", "model.remat_save": ()},
    {"model.remat": "none", "model.remat_save": ()},
)
REMAT_OF_EXPERTS: tuple[Changes, ...] = (  # whose products are not computed again
    {"model.remat": "names", "model.remat_save": ("layer_input", *MLP_NAMES)},
    {"model.remat": "names", "model.remat_save": ("layer_input", "attention", "attention_output", *MLP_NAMES)},
    {"model.remat": "names", "model.remat_save": (*QUERIES, "attention", "attention_output", *MLP_NAMES)},
)
MOST_TENSOR = 16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Changes to the config, the setting that they make, and what arithmetic says of it."""

    changes: Changes
    setting: Setting
    seconds: float
    fits: bool


def candidates(cfg: Config, machine: Topology) -> Iterator[Candidate]:
    """All that are possible, none compiled. A mesh that the config cannot run on is left out."""
    for mesh in meshes(cfg, machine):
        try:
            base = make_setting(changed(cfg, mesh | {"train.accumulation": 1}), machine)
        except UserError:
            continue
        own = cfg.train.global_batch_size // base.layout.batch_shards
        chunks = sorted({cfg.train.loss_chunk, 0})  # all logits at once are computed once
        for remat, pieces, chunk in itertools.product(ways_of_remat(cfg.model), divisors(own), chunks):
            changes = mesh | remat | {"train.accumulation": pieces, "train.loss_chunk": chunk}
            if (candidate := weigh(base, changes)) is not None:
                yield candidate


def ways_of_remat(model: TransformerConfig) -> list[Changes]:
    """Those that name no tensor which the model has not."""
    absent = () if model.activation in GATED else ("mlp_gate",)
    ways = REMAT + (REMAT_OF_EXPERTS if model.moe.num_experts else ())
    there = lambda names: tuple(name for name in names if name not in absent)  # noqa: E731
    return [way | {"model.remat_save": there(way["model.remat_save"])} for way in ways]


def weigh(base: Setting, changes: Changes) -> Candidate | None:
    """A candidate on the mesh of `base`; None where the config refuses it."""
    try:
        new = changed(base.cfg, {key: value for key, value in changes.items() if not key.startswith("mesh.")})
        check(new)
        check_devices(new, base.machine.devices)
    except UserError:
        return None
    setting = dataclasses.replace(base, cfg=new)
    found = quick_estimate(setting)
    return Candidate(changes, setting, found.times.total, found.fits)


def meshes(cfg: Config, machine: Topology) -> Iterator[Changes]:
    """Sizes of the axes that one would try: powers of two, tensor and expert parallel groups inside a slice or node."""
    devices, domain = machine.devices, machine.domain
    experts = cfg.model.moe.num_experts
    for tensor in powers(min(MOST_TENSOR, domain)):
        for expert in powers(min(experts, domain)) if experts else [1]:
            if devices % (tensor * expert):
                continue
            rest = devices // (tensor * expert)
            for data in {1, machine.domains, *(n for n in (2, 4, 8) if machine.domains == 1)}:
                if rest % data:
                    continue
                changes: Changes = {
                    "mesh.data": data, "mesh.fsdp": rest // data, "mesh.expert": expert, "mesh.tensor": tensor,
                    "mesh.sequence": 1, "mesh.stage": 1, "mesh.across_slices": across(data, rest // data, machine),
                    "mesh.activation_rules": ("residual_length=sequence+tensor",) if tensor > 1 else (),
                }  # fmt: skip
                yield changes


def across(data: int, fsdp: int, machine: Topology) -> tuple[str, ...]:
    if machine.domains == 1:
        return ()
    axis = "data" if data % machine.domains == 0 else "fsdp"
    return (f"{axis}={machine.domains}",) if (data if axis == "data" else fsdp) % machine.domains == 0 else ()


def best(cfg: Config, machine: Topology, count: int) -> list[Candidate]:
    """The `count` fastest of those that fit, by arithmetic; no two with the same mesh and remat."""
    pieces = ("train.accumulation", "train.loss_chunk")
    fitting = sorted((one for one in candidates(cfg, machine) if one.fits), key=lambda one: one.seconds)
    chosen: dict[tuple, Candidate] = {}
    for one in fitting:
        kind = tuple(str(value) for key, value in one.changes.items() if key not in pieces)
        chosen.setdefault(kind, one)
    return list(chosen.values())[:count]


def changed(cfg: Config, changes: Changes) -> Config:
    return override(cfg, [f"{key}={spelled(value)}" for key, value in changes.items()])


def spelled(value: object) -> str:
    """As an override spells it."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def differing(cfg: Config, changes: Changes) -> Changes:
    """Of the changes, those that are any."""

    def now(key: str) -> object:
        part, name = key.split(".")
        return getattr(getattr(cfg, part), name)

    return {key: value for key, value in changes.items() if now(key) != value}


def powers(largest: int) -> list[int]:
    return [2**n for n in range(int(math.log2(largest)) + 1)] if largest else [1]


def divisors(n: int) -> list[int]:
    return [d for d in (1, 2, 4, 8, 16, 32, 64, 128) if d <= n and n % d == 0]
