"""The encoder's cells of the equivalence matrix: a mesh, a form of encoder and a number of micro-batches, each against
one device in float64, as `equivalence.py` says it of decoders."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from equivalence import Found, errors, relative, stderr_lines
from tiny import QUICK, build, mesh_layout, numbers
from tiny_encoders import DISENTANGLED, ROTARY, encoder, texts

from llm_jax.config import EncoderConfig
from llm_jax.objectives.labelled import LabelledObjective
from llm_jax.objectives.masked import MaskedObjective, ReplacedObjective
from llm_jax.sharding import Layout
from llm_jax.training import step

ROWS, LENGTH, PLACES = 16, 16, 8
OBJECTIVES = {
    "masked_pairs": MaskedObjective(), "text": LabelledObjective("classification"), "replaced": ReplacedObjective(),
    "generator": ReplacedObjective(weight=50.0),
}  # fmt: skip
ELECTRA = dict(head="replaced", generator_divisor=2)
DROPOUT = dict(dropout=dict(embedding=0.2, attention_output=0.2, mlp_output=0.2), head_dropout=0.2)
DROPOUTS = dict(dropout=dict(attention=0.2, **DROPOUT["dropout"]), scan_layers=False)
# Four layers: one without a norm, a period of two kinds, and one that begins another period.
MODERN = ROTARY | dict(sliding_window=4, layer_pattern=("full", "window"), window_rope_base=50.0, num_layers=4)
# name: (mesh, what differs from BERT with masked pairs, micro-batches)
CELLS = {
    "data, fsdp": (dict(data=2, fsdp=4), {}, 1),
    "data, tensor, dropout, micro-batches": (dict(data=2, tensor=4), DROPOUT, 2),
    "fsdp, all-to-all": (dict(fsdp=2, sequence=4), dict(attention_kernel="all_to_all"), 1),
    "tensor, ring": (dict(tensor=2, sequence=4), dict(attention_kernel="ring"), 1),
    "text, fsdp, tensor": (dict(fsdp=4, tensor=2), dict(head="text", **DROPOUT), 2),
    "replaced, projected, fsdp": (dict(fsdp=4, data=2), dict(head="replaced", embedding_dim=8), 1),
    "ELECTRA, data, tensor, dropout, micro-batches": (dict(data=4, tensor=2), ELECTRA | DROPOUTS, 2),
    "ELECTRA, pipeline": (dict(data=2, stage=2, stage_microbatches=2), ELECTRA | dict(num_layers=4), 1),
    "ELECTRA, fsdp, split rows": (dict(fsdp=2, sequence=4), ELECTRA | dict(embedding_dim=8), 1),
    "ModernBERT, ring": (dict(fsdp=2, sequence=4), MODERN | dict(attention_kernel="ring"), 1),
    "ModernBERT, tensor, unrolled": (dict(data=2, tensor=4), MODERN | dict(scan_layers=False, remat="full"), 1),
    "ModernBERT by the mean, data, fsdp": (
        dict(data=4, fsdp=2), MODERN | dict(head="text", head_pooling="mean", head_form="modernbert"), 2,
    ),
    "DeBERTa, fsdp, tensor": (dict(fsdp=2, tensor=4), DISENTANGLED, 2),
    "pipeline": (dict(data=2, stage=2, stage_microbatches=2), dict(num_layers=4), 1),
    "ModernBERT, pipeline": (dict(stage=2, tensor=2), MODERN | dict(num_layers=6), 1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EncoderCell:
    """One of CELLS."""

    name: str

    def __str__(self) -> str:
        return f"encoder: {self.name}"


def measure_encoder(cell: EncoderCell) -> Found:
    """How far the cell is from one plain program with reference attention and all rows at once."""
    mesh, changes, accumulation = CELLS[cell.name]
    cfg = encoder(**{"head": "masked_pairs", "vocab_multiple": 4} | changes)
    plain = dataclasses.replace(cfg, attention_kernel="reference")
    with jax.enable_x64(True):
        batch, params = texts(ROWS, LENGTH, PLACES), numbers(build(cfg, dtype="float64"))
        expected = gradients(plain, Layout(), params, batch, 1)
        began = time.monotonic()
        with stderr_lines() as lines:
            found = gradients(cfg, mesh_layout(**mesh), params, batch, accumulation)
    seconds = time.monotonic() - began
    for name, share in expected[0].items():
        if "accuracy" in name:  # shares are told in float32
            assert relative(found[0][name], share) < 1e-6, name
    losses = [({name: terms[name] for name in terms if "loss" in name}, grads) for terms, grads in (found, expected)]
    complaints = tuple(line for line in lines if "rematerialization" in line)
    return Found(*errors(*losses), complaints, seconds)


def gradients(
    cfg: EncoderConfig, layout: Layout, params: Any, batch: dict[str, np.ndarray], accumulation: int
) -> tuple[dict[str, np.ndarray], Any]:
    """Terms of the loss and gradient of one global batch."""
    objective = OBJECTIVES["generator" if cfg.generator_divisor else cfg.head]
    model = build(cfg, layout, "float64")

    def run(params: Any, batch: Any) -> Any:
        settings = dict(layout=layout, seed=3, step=jnp.int32(7), accumulation=accumulation)
        return step.gradients(model, objective, params, batch, **settings)[1::-1]

    outputs = {}
    if layout.mesh is not None:
        shapes, axes = model.shapes(), model.axes()
        params = jax.device_put(params, layout.parameter_shardings(shapes, axes))
        gradient = layout.parameter_shardings(shapes, axes, layout.gradient_rules)
        outputs = {"out_shardings": (layout.replicated, gradient)}
    found = jax.jit(run, **outputs, compiler_options=QUICK)(params, layout.put_batch(batch, ROWS))
    return jax.tree.map(np.asarray, found)
