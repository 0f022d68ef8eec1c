"""The equivalence matrix: cells of (mesh, packing, accumulation, scan, chunked loss, experts), each against one device.

A cell is a run's whole `Config`, passed by the checks of a real run, and its gradient is that of `training.step`. The
reference is one plain program: no mesh, one batch, reference attention, all the logits at once. Both get the same
parameters, the reference's layers unstacked where the cell does not scan them.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import QUICK, numbers, packed, unstacked

from llm_jax.config import Config, TransformerConfig, check, check_devices, override
from llm_jax.config.kinds import segments
from llm_jax.errors import ConfigError
from llm_jax.models import registry
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.sharding import Layout, abstract_layout, make_layout, path_name
from llm_jax.training import step
from llm_jax.training.back_end import check_attention

DEVICES, ROWS, LENGTH = 8, 32, 16
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-10, 1e-9  # float64, relative

# ------------------------------------------------------------------------------------------------ cells

# A mesh kind and the mesh axis that it splits; the two forms of context parallelism split the same one.
AXES = {
    "data": "data", "fsdp": "fsdp", "tensor": "tensor", "ring": "sequence", "all_to_all": "sequence",
    "expert": "expert", "stage": "stage",
}  # fmt: skip
MESHES = [(kind,) for kind in AXES] + list(itertools.combinations(AXES, 2))
FACTORS = {
    "mesh": tuple(MESHES),
    "packed": (True, False),
    "accumulation": (1, 4),
    "scan": (True, False),
    "chunked": (False, True),
    "moe": (False, True),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A level of each of FACTORS; `changes` are overrides such as "model.dropout.mlp_output=0.1"."""

    mesh: tuple[str, ...]
    packed: bool = True
    accumulation: int = 1
    scan: bool = True
    chunked: bool = False
    moe: bool = False
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        moe = "capacity" if self.capacity else "dropless"
        words = [
            " x ".join(f"{kind} {size}" for kind, size in self.sizes.items()),
            *(["2 rounds"] if self.stage_repeats == 2 else []),
            "packed" if self.packed else "unpacked",
            f"accumulation {self.accumulation}",
            "scan" if self.scan else "unrolled",
            "chunked" if self.chunked else "all logits",
            f"experts ({moe})" if self.moe else "dense",
            *self.changes,
        ]
        return ", ".join(words)

    # What goes by turns goes by parities that differ, so that the full product has every mixture and an array of two
    # cells a mesh has each form on some mesh.

    @property
    def sizes(self) -> dict[str, int]:
        """Devices of each kind: eight, 2 x 4 and 4 x 2 by turns, 2 x 2 x 2; a pipeline of two rounds alone has four."""
        turned = self._odd("packed", "accumulation", "chunked")
        shapes = (DEVICES // self.stage_repeats,), (4, 2) if turned else (2, 4), (2, 2, 2)
        return dict(zip(self.mesh, shapes[len(self.mesh) - 1], strict=True))

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def stage_repeats(self) -> int:
        """GPipe and the circular form by turns."""
        return 1 + ("stage" in self.mesh and self._odd("accumulation", "chunked") != (self._number % 2 == 1))

    @property
    def capacity(self) -> bool:
        """Dropless experts, and experts with room for an even load, by turns."""
        return self.moe and self._odd("packed", "accumulation") != (self._number // 2 % 2 == 1)

    @property
    def _number(self) -> int:
        return MESHES.index(self.mesh) if self.mesh in MESHES else 0

    def _odd(self, *factors: str) -> bool:
        """Is it an odd number of these factors that have their first level?"""
        return sum(getattr(self, factor) == FACTORS[factor][0] for factor in factors) % 2 == 1

    def model(self) -> tuple[str, ...]:
        """Overrides that say what is computed: the reference has them too."""
        changes = [change for change in self.changes if not change.startswith(("mesh.", "precision."))]
        experts = ()
        if self.moe:
            factor = 1.0 * self.capacity
            experts = ("num_experts=8", "balance_loss=0.1", "router_z_loss=0.01", f"capacity_factor={factor}")
        return (
            f"model.num_layers={8 if 'stage' in self.mesh else 2}",
            f"data.mask_documents={self.packed}",
            *(f"model.moe.{key}" for key in experts),
            *changes,
        )

    def form(self) -> tuple[str, ...]:
        """Overrides that say how: none of them may change a number."""
        kernels = "+".join(kind for kind in self.mesh if AXES[kind] == "sequence")
        return (
            f"train.accumulation={self.accumulation}",
            f"train.loss_chunk={LENGTH // 2 * self.chunked}",
            f"model.scan_layers={self.scan}",
            f"model.attention_kernel={kernels or 'auto'}",
            "mesh.data=1",
            *(f"mesh.{AXES[kind]}={size}" for kind, size in self.sizes.items()),
            f"mesh.stage_repeats={self.stage_repeats}",
            *(change for change in self.changes if change.startswith("mesh.")),
            *self.precision(),
        )

    def precision(self) -> tuple[str, ...]:
        return tuple(change for change in self.changes if change.startswith("precision."))


PLAIN = ("mesh.data=1", "model.attention_kernel=reference")
BASE = (
    "model.vocab_size=30", "model.vocab_multiple=32", "model.embed_dim=16", "model.num_heads=16",
    "model.num_kv_heads=8", "model.head_dim=2", "model.mlp_dim=16", f"model.max_length={LENGTH}",
    f"data.sequence_length={LENGTH}", "data.path=synthetic", f"train.global_batch_size={ROWS}", "train.steps=1",
    "train.z_loss=1e-2", "train.label_smoothing=0.1", "precision.params=float64", "precision.compute=float64",
)  # fmt: skip


def product() -> list[Cell]:
    """Every combination of levels, also those that are refused."""
    return [Cell(*levels) for levels in itertools.product(*FACTORS.values())]


# What the cells of a family have besides; the matrix's own experts are theirs, with a capacity by turns.
FAMILIES = {
    "gemma": (
        "norm_placement=sandwich", "norm_scale=zero", "embedding_scale=True", "activation=geglu", "sliding_window=5",
        "layer_pattern=window,full", "window_rope_base=100", "qk_norm=head", "attention_scale=0.3",
        "attention_softcap=3.0", "logits_softcap=5.0",
    ),
    "gemma3": (  # its layers end within a period
        "norm_placement=sandwich", "norm_scale=zero", "embedding_scale=True", "activation=geglu", "sliding_window=5",
        "layer_pattern=window,window,full", "window_rope_base=100", "rope.scaling=linear", "rope.factor=8",
        "qk_norm=head", "attention_scale=0.3",
    ),
    "olmo2": ("norm_placement=output", "qk_norm=all", "layer_pattern=full,full_without_positions", "bias=attention"),
    "neox": (
        "norm_placement=parallel", "norm=layernorm", "bias=all", "activation=gelu", "num_kv_heads=0", "head_dim=4",
        "rope.fraction=0.5", "tie_embeddings=False",
    ),
    "deepseek": (
        "num_kv_heads=0", "latent.kv_rank=8", "latent.query_rank=8", "latent.rope_dim=2", "latent.value_dim=3",
        "moe.scores=sigmoid", "moe.groups=4", "moe.top_groups=2", "moe.top_k=3", "moe.scale=1.5", "moe.expert_dim=8",
        "moe.shared_dim=16", "moe.dense_layers=1", "moe.balance_bias=True", "tie_embeddings=False",
    ),
    "gpt_oss": (
        "sliding_window=5", "layer_pattern=window,full", "attention_sinks=True", "bias=all", "tie_embeddings=False",
        "activation=clamped_swiglu", "moe.router_bias=True", "rope.scaling=yarn", "rope.factor=2",
        "rope.original_length=8", "rope.truncate=False",
    ),
}  # fmt: skip
# And in a pipeline: after the dense layer, or of both kinds, eight each. Three layers do not fill a pattern of two, nor
# eight or 26 one of three.
LAYERS = {
    "gemma": (3, 16), "gemma3": (8, 26), "olmo2": (3, 16), "neox": (2, 8), "deepseek": (3, 9), "gpt_oss": (2, 16),
}  # fmt: skip


def of_family(name: str, *mesh: str, **levels: Any) -> Cell:
    layers = LAYERS[name]["stage" in mesh]
    changes = [f"model.{change}" for change in (f"num_layers={layers}", *FAMILIES[name])]
    moe = "expert" in mesh or any(change.startswith("moe.") for change in FAMILIES[name])
    return Cell(mesh, moe=moe, changes=tuple(changes), **levels)


def family_cells(name: str) -> list[Cell]:
    """One on each mesh, with the other levels by turns; a pipeline scans its layers."""
    cells = []
    for number, mesh in enumerate(mesh for mesh in MESHES if mesh != ("ring", "all_to_all")):
        levels = dict(packed=number % 2 == 0, accumulation=(1, 4)[number // 2 % 2], chunked=number % 3 == 0)
        cells.append(of_family(name, *mesh, scan="stage" in mesh or number % 5 != 0, **levels))
    return cells


def config(cell: Cell) -> Config:
    """The cell's run, passed by all checks that a run on its devices passes. Raises ConfigError where it is refused."""
    cfg = override(Config(), (*BASE, *cell.model(), *cell.form()))
    check(cfg)
    check_devices(cfg, cell.num_devices)
    check_attention(cfg, abstract_layout(cfg.mesh, cell.num_devices, "cpu"))
    return cfg


@functools.cache
def refusal(cell: Cell) -> str:
    """Why the config is refused; "": it is not."""
    try:
        config(cell)
    except ConfigError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------ programs


def gradients(cfg: Config, layout: Layout, params: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Terms of the loss and gradient of one global batch. `params`: nested dict of (L, ...) stacked layers, as are
    the gradients."""
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    objective = LanguageObjective.make(cfg)

    def run(params: Any, batch: Any) -> Any:
        settings = dict(layout=layout, seed=3, step=jnp.int32(7), accumulation=cfg.train.accumulation)
        grads, terms, _ = step.gradients(model, objective, params, batch, **settings)
        return terms | {"total": sum(k * terms[name] for name, k in objective.coefficients().items())}, grads

    params = params if cfg.model.scan_layers else unstacked(params, cfg.model)
    params = jax.tree.map(lambda p: p.astype(cfg.precision.params), params)
    shapes, axes, outputs = model.shapes(), model.axes(), {}
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    if layout.mesh is not None:
        params = jax.device_put(params, layout.parameter_shardings(shapes, axes))
        shardings = layout.parameter_shardings(shapes, axes, layout.gradient_rules)
        outputs = {"out_shardings": (layout.replicated, shardings)}
    batch = layout.put_batch(packed(ROWS, LENGTH), ROWS)
    terms, grads = jax.tree.map(np.asarray, jax.jit(run, **outputs, compiler_options=QUICK)(params, batch))
    return terms, grads if cfg.model.scan_layers else stacked(grads, cfg.model)


def stacked(params: Any, model: TransformerConfig) -> Any:
    """`unstacked`, the way back."""
    layers, stack = [params["stack"][f"block_{i}"] for i in range(model.num_layers)], {}
    for segment in segments(model):
        part = layers[segment.first : segment.first + len(segment.kinds)]
        stack[segment.name] = jax.tree.map(lambda *leaves: np.stack(leaves), *part)
    return params | {"stack": stack}


@functools.cache
def one_device(overrides: tuple[str, ...]) -> tuple[Any, dict[str, np.ndarray], Any]:
    """Parameters, terms and gradient of the plain program."""
    cfg = override(Config(), (*BASE, *overrides, *PLAIN))
    check(cfg)
    params = numbers(registry.build(cfg.model, Layout(), Precision.make(cfg.precision)))
    params = jax.tree.map(lambda p: p.astype(np.float32).astype(p.dtype), params)  # that float32 masters hold too
    return params, *gradients(cfg, Layout(), params)


# ------------------------------------------------------------------------------------------------ comparison


@dataclasses.dataclass(frozen=True)
class Found:
    """How far a cell is from one device.

    Attributes:
      loss_error: the largest of all terms and their total, relative.
      gradient_error: the largest of all parameters: norm of the difference over the norm of all gradients.
      parameter: the one that has it.
      complaints: lines that XLA wrote about tensors that it had to replicate.
      seconds: for the cell's program, compiling included.
    """

    loss_error: float
    gradient_error: float
    parameter: str
    complaints: tuple[str, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        close = self.loss_error <= LOSS_TOLERANCE and self.gradient_error <= GRADIENT_TOLERANCE  # False for NaN
        return close and not self.complaints


def measure(cell: Cell) -> Found:
    """Raises ConfigError where the cell is refused."""
    cfg = config(cell)
    layout = make_layout(cfg.mesh, jax.devices()[: cell.num_devices])
    with jax.enable_x64(True):
        params, *expected = one_device(cell.model())
    began = time.monotonic()
    with stderr_lines() as lines, jax.enable_x64(cfg.precision.compute == "float64"):
        found = gradients(cfg, layout, params)
    seconds = time.monotonic() - began
    complaints = tuple(line for line in lines if "rematerialization" in line)
    return Found(*errors(found, expected), complaints, seconds)


def plain_errors(cell: Cell) -> tuple[float, float, str]:
    """How far one device in the cell's precision is from float64: `errors` of the plain program."""
    return errors(*_plain_pair(cell.model(), cell.precision()))


@functools.cache
def _plain_pair(model: tuple[str, ...], precision: tuple[str, ...]) -> tuple[Any, Any]:
    with jax.enable_x64(True):
        params, *expected = one_device(model)
    return gradients(override(Config(), (*BASE, *model, *PLAIN, *precision)), Layout(), params), expected


def errors(found: Any, expected: Any) -> tuple[float, float, str]:
    """The first three fields of `Found` for two pairs of terms and gradient."""
    (terms, grads), (true_terms, true_grads) = found, expected
    assert terms.keys() == true_terms.keys() and jax.tree.structure(grads) == jax.tree.structure(true_grads)
    loss_error = max(relative(terms[name], true_terms[name]) for name in terms)
    named_grads = jax.tree_util.tree_leaves_with_path(true_grads)
    # A balance bias is pulled by whole numbers, which are no slopes of the loss: they are measured by themselves.
    total = norm([grad for path, grad in named_grads if not is_pulled(path)])
    apart = jax.tree_util.tree_map_with_path(
        lambda path, a, b: norm([a.astype(np.float64) - b]) / (norm([b]) if is_pulled(path) else total),
        grads,
        true_grads,
    )
    named = [(error, path_name(path)) for path, error in jax.tree_util.tree_leaves_with_path(apart)]
    error, name = max(named, key=lambda pair: (math.isnan(pair[0]), pair))
    return loss_error, error, name


def is_pulled(path: Any) -> bool:
    return path_name(path).endswith("balance_bias")


def norm(arrays: list[np.ndarray]) -> float:
    return math.sqrt(sum(np.square(array).sum() for array in arrays))


def relative(value: np.ndarray, expected: np.ndarray) -> float:
    error = abs(float(value) - float(expected)) / (abs(float(expected)) or 1.0)
    return math.inf if math.isnan(error) else error  # max() would lose a NaN


@contextlib.contextmanager
def stderr_lines() -> Iterator[list[str]]:
    """Collects what is written to file descriptor 2, where XLA writes, and writes it out again afterwards."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said = file.read()
            lines += said.decode(errors="replace").splitlines()
            os.write(2, said)


# ------------------------------------------------------------------------------------------------ covering array


def pairs(cell: Cell) -> frozenset[Any]:
    """All pairs of levels that the cell has: ((factor, level), (factor, level))."""
    return frozenset(itertools.combinations(((name, getattr(cell, name)) for name in FACTORS), 2))


def covering_array(cells: list[Cell]) -> list[Cell]:
    """Some of `cells` that have all pairs of levels that any of them has: the greedy choice, always the same one."""
    missing, chosen = frozenset().union(*map(pairs, cells)), []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))  # the first of equal ones
        chosen.append(best)
        missing -= pairs(best)
    return chosen
