"""The encoder's row of the equivalence matrix: any mesh gives the terms and gradients of one device, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence import errors, stderr_lines
from tiny import QUICK, build, mesh_layout, numbers
from tiny_encoders import DISENTANGLED, ROTARY, encoder, texts

from llm_jax.objectives.labelled import LabelledObjective
from llm_jax.objectives.masked import MaskedObjective, ReplacedObjective
from llm_jax.sharding import Layout
from llm_jax.training import step

ROWS, LENGTH, PLACES = 16, 16, 8
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-10, 1e-9
OBJECTIVES = {
    "masked_pairs": MaskedObjective(), "text": LabelledObjective("classification"), "replaced": ReplacedObjective(),
}  # fmt: skip
DROPOUT = dict(dropout=dict(embedding=0.2, attention_output=0.2, mlp_output=0.2), head_dropout=0.2)
MODERN = ROTARY | dict(sliding_window=4, layer_pattern=("full", "window"), window_rope_base=50.0, num_layers=4)
# name: (mesh, what differs from BERT with masked pairs, micro-batches)
CELLS = {
    "data, fsdp": (dict(data=2, fsdp=4), {}, 1),
    "data, tensor, dropout, micro-batches": (dict(data=2, tensor=4), DROPOUT, 2),
    "fsdp, all-to-all": (dict(fsdp=2, sequence=4), dict(attention_kernel="all_to_all"), 1),
    "tensor, ring": (dict(tensor=2, sequence=4), dict(attention_kernel="ring"), 1),
    "text, fsdp, tensor": (dict(fsdp=4, tensor=2), dict(head="text", **DROPOUT), 2),
    "replaced, projected, fsdp": (dict(fsdp=4, data=2), dict(head="replaced", embedding_dim=8), 1),
    "ModernBERT, ring": (dict(fsdp=2, sequence=4), MODERN | dict(attention_kernel="ring"), 1),
    "ModernBERT, tensor, unrolled": (dict(data=2, tensor=4), MODERN | dict(scan_layers=False, remat="full"), 1),
    "ModernBERT by the mean, data, fsdp": (
        dict(data=4, fsdp=2), MODERN | dict(head="text", head_pooling="mean", head_form="modernbert"), 2,
    ),
    "DeBERTa, fsdp, tensor": (dict(fsdp=2, tensor=4), DISENTANGLED, 2),
    "pipeline": (dict(data=2, stage=2, stage_microbatches=2), dict(num_layers=4), 1),
}  # fmt: skip
ALWAYS = ("data, tensor, dropout, micro-batches", "tensor, ring", "DeBERTa, fsdp, tensor")


def gradients(cfg, layout, params, batch, accumulation):
    model, objective = build(cfg, layout, "float64"), OBJECTIVES[cfg.head]

    def run(params, batch):
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


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ALWAYS)) for n in CELLS])
def test_a_mesh_is_equal_to_one_device(x64, name):
    mesh, changes, accumulation = CELLS[name]
    cfg = encoder(**{"head": "masked_pairs", "vocab_multiple": 4} | changes)
    batch, params = texts(ROWS, LENGTH, PLACES), numbers(build(cfg, dtype="float64"))
    plain = dataclasses.replace(cfg, attention_kernel="reference")
    expected = gradients(plain, Layout(), params, batch, 1)
    with stderr_lines() as lines:
        found = gradients(cfg, mesh_layout(**mesh), params, batch, accumulation)
    told = [{n: float(terms[n]) for n in terms if "accuracy" in n} for terms, _ in (found, expected)]
    assert told[0] == pytest.approx(told[1], rel=1e-6)  # shares, which are told in float32
    found, expected = (({n: terms[n] for n in terms if "loss" in n}, grads) for terms, grads in (found, expected))
    loss_error, gradient_error, where = errors(found, expected)
    assert loss_error <= LOSS_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE, (loss_error, gradient_error, where)
    assert not [line for line in lines if "rematerialization" in line]
