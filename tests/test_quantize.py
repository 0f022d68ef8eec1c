"""Products of 8-bit numbers: near the exact ones, the same on every mesh, in nothing but the blocks' linear layers."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, assert_close, decoder, mesh_layout, numbers, packed, unstacked

from llm_jax.config import OptimConfig
from llm_jax.errors import ConfigError
from llm_jax.models import registry
from llm_jax.models.quantize import quantized_product, require_library
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import optim, step
from llm_jax.training import state as train_state

MISSING = importlib.util.find_spec("qwix") is None
CFG = decoder(num_heads=8, head_dim=4, num_kv_heads=4, mlp_dim=32, vocab_multiple=32, qk_norm="head")
WITHOUT_SCAN = dataclasses.replace(CFG, scan_layers=False)
ROWS, LENGTH = 8, 8


def with_qwix(test):
    """A test of .ci/run's environment; elsewhere it is skipped."""
    return pytest.mark.parity(pytest.mark.skipif(MISSING, reason="needs qwix (the extra `qwix`)")(test))


def build(products, cfg=CFG, layout=None, dtype="float32"):
    return registry.build(cfg, layout or Layout(), Precision(jnp.dtype(dtype), jnp.dtype(dtype), products))


# ------------------------------------------------------------------------------------------------- the product


@with_qwix
def test_int8_by_hand():
    """Scales of 1 and 1/2; the largest numbers, of either sign, become 127. Zeros stay zeros."""
    x = jnp.array([[127.0, 1.0, -2.4], [0, 0, 0]])
    matrix = jnp.array([[127.0], [63.2], [-1.4]])
    dy = jnp.array([[127.0], [-63.5]])
    y, backward = jax.vjp(functools.partial(quantized_product, products="int8"), x, matrix)
    dx, dw = backward(dy)
    row = np.array([127, 63, -1])
    np.testing.assert_allclose(y, [[127 * 127 + 63 + 2], [0]], rtol=1e-6)
    np.testing.assert_allclose(dx, [127 * row, -63.5 * row], rtol=1e-6)
    np.testing.assert_allclose(dw, [[127 * 127], [127], [-2 * 127]], rtol=1e-6)


@with_qwix
def test_fp8_by_hand():
    """e4m3: scales of 1, 17 and 3.1 become 16 and 3. e5m2, up to 57344: 17 of 16, 20, 24 becomes 16."""
    x = jnp.array([[448.0, 17.0, 3.1]])
    matrix = jnp.array([[448.0, 448.0], [28.0, 0.0], [0.0, -9.6]])
    dy = jnp.array([[57344.0, 17.0]])
    y, backward = jax.vjp(functools.partial(quantized_product, products="fp8"), x, matrix)
    dx, dw = backward(dy)
    np.testing.assert_array_equal(y, [[448 * 448 + 16 * 28, 448 * 448 - 3 * 10]])
    np.testing.assert_array_equal(dx, [[448 * (57344 + 16), 28 * 57344, -10 * 16]])
    np.testing.assert_array_equal(dw, [[448 * 57344, 448 * 17], [16 * 57344, 16 * 17], [3 * 57344, 3 * 17]])


def rounding(x, products, axis, gradient=False):
    """The most by which each number of x may change, with a scale for each index of `axis`."""
    largest = np.abs(x).max(1 - axis, keepdims=True)
    if products == "int8":
        return np.broadcast_to(largest / 127 / 2, x.shape)  # half a step
    mantissa, top, smallest = (2, 57344, 2.0**-16) if gradient else (3, 448, 2.0**-9)
    return np.maximum(np.abs(x) * 2.0 ** -(mantissa + 1), largest / top * smallest / 2)


@with_qwix
@pytest.mark.parametrize("products", ["int8", "fp8"])
def test_products_lie_within_the_rounding_of_their_operands(x64, products):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 32)) * np.exp(rng.normal(size=(24, 1)))  # tokens and outputs of unlike size
    matrix = rng.normal(size=(32, 16)) * np.exp(rng.normal(size=(1, 16)))
    dy = rng.normal(size=(24, 16)) ** 3
    found, backward = jax.vjp(functools.partial(quantized_product, products=products), x, matrix)
    dx, dw = backward(jnp.asarray(dy))

    of_x, of_w = rounding(x, products, 0), rounding(matrix, products, 1)
    bound = of_x @ np.abs(matrix) + np.abs(x) @ of_w + of_x @ of_w
    assert (np.abs(found - x @ matrix) <= bound * (1 + 1e-9)).all()
    assert (np.abs(dw - x.T @ dy) <= of_x.T @ np.abs(dy) * (1 + 1e-9)).all()

    top = 127 if products == "int8" else 448
    scales = np.abs(matrix).max(0) / top
    steps = np.abs(matrix / scales) + rounding(matrix / scales, products, 1)  # at most so large
    of_dy = rounding(dy * scales, products, 0, gradient=True)
    bound = np.abs(dy) @ of_w.T + of_dy @ steps.T
    assert (np.abs(dx - dy @ matrix.T) <= bound * (1 + 1e-9)).all()
    assert np.abs(found - x @ matrix).max() > 0  # it does round


@with_qwix
@pytest.mark.parametrize("products", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(products, bad):
    """Whole numbers have no NaN: a step gone bad must show all the same."""
    x, matrix = jnp.ones((2, 3)).at[0, 1].set(bad), jnp.ones((3, 2))
    y, backward = jax.vjp(functools.partial(quantized_product, products=products), x, matrix)
    assert not jnp.isfinite(y[0]).any() and jnp.isfinite(y[1]).all()
    assert not jnp.isfinite(backward(jnp.ones((2, 2)))[1]).all()
    dx, dw = jax.vjp(functools.partial(quantized_product, products=products), jnp.ones((2, 3)), matrix)[1](
        jnp.ones((2, 2)).at[0, 1].set(bad)
    )
    assert not jnp.isfinite(dx[0]).any() and jnp.isfinite(dx[1]).all() and not jnp.isfinite(dw).all()


# --------------------------------------------------------------------------------------------------- the model


def gradient_program(products, sizes=None, accumulation=1, dtype="float64", **changes):
    cfg = dataclasses.replace(CFG, **changes)
    layout = mesh_layout(**sizes) if sizes else Layout()
    model = build(products, cfg, layout, dtype)
    params, shardings = numbers(model), layout.parameter_shardings(model.shapes(), model.axes())
    if sizes:
        params = jax.device_put(params, shardings)

    def gradients(params, batch):
        objective = LanguageObjective(moe=cfg.moe, num_layers=cfg.num_layers)
        return step.gradients(
            model, objective, params, batch, layout=layout, seed=3, step=jnp.int32(7), accumulation=accumulation
        )[:2]

    run = jax.jit(gradients, out_shardings=(shardings, layout.replicated), compiler_options=QUICK)
    return jax.tree.map(np.asarray, run(params, layout.put_batch(packed(ROWS, LENGTH), ROWS)))


on_one_device = functools.cache(gradient_program)
MESHES = [
    dict(data=8), dict(fsdp=8), dict(tensor=4), dict(sequence=2), dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, tensor=2, sequence=2),
]  # fmt: skip


@with_qwix
@pytest.mark.parametrize(
    ("products", "sizes"), [("int8", sizes) for sizes in MESHES] + [("fp8", sizes) for sizes in MESHES[-2:]], ids=str
)
def test_every_mesh_gives_the_gradient_of_one_device(x64, products, sizes):
    """Scales are maxima over the whole of an axis, on however many devices it lies."""
    assert_close(gradient_program(products, sizes), on_one_device(products), atol=1e-10)


@with_qwix
@pytest.mark.parametrize("products", ["int8", "fp8"])
@pytest.mark.parametrize("sizes", MESHES[1:4], ids=str)
def test_every_mesh_in_float32(products, sizes):
    """In norm: sums in another order may put a number on the other side of a rounding boundary, one step of it away.

    Here none does, and 2e-6 was the most; 1e-2 would take hundreds of them.
    """
    found, expected = gradient_program(products, sizes, dtype="float32"), on_one_device(products, dtype="float32")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) <= 1e-2 * np.linalg.norm(y)


@with_qwix
@pytest.mark.parametrize("products", ["int8", "fp8"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(accumulation=4), dict(remat="full"), dict(accumulation=2, sizes=dict(data=2, tensor=2)),
        dict(sizes=dict(stage=2, fsdp=2)),
    ],
    ids=str,
)  # fmt: skip
def test_micro_batches_stages_and_remat_change_nothing(x64, products, changes):
    assert_close(gradient_program(products, **changes), on_one_device(products), atol=1e-10)


@with_qwix
def test_experts_on_a_mesh(x64):
    """Attention's products are rounded; the experts' grouped ones and the router's stay as they are."""
    changes = dict(moe=dataclasses.replace(CFG.moe, num_experts=4, top_k=2))
    found = gradient_program("int8", dict(data=2, expert=2, tensor=2), **changes)
    assert_close(found, gradient_program("int8", **changes), atol=1e-10)


@with_qwix
@pytest.mark.parametrize("products", ["int8", "fp8"])
@pytest.mark.parametrize("layers", [2, 3])
def test_scanned_or_not(x64, products, layers):
    """The same numbers, layer for layer; three layers of two kinds are in two stacks."""
    cfg = dataclasses.replace(CFG, num_layers=layers, layer_pattern=("window", "full"), sliding_window=3)
    scanned = build(products, cfg, dtype="float64")
    looped = build(products, dataclasses.replace(cfg, scan_layers=False), dtype="float64")
    params, tokens = numbers(scanned), packed(2, LENGTH)["tokens"]
    found = jax.jit(looped.apply)(unstacked(params, cfg), tokens)
    expected = jax.jit(scanned.apply)(params, tokens)
    assert_close(found[..., : CFG.vocab_size], expected[..., : CFG.vocab_size], atol=1e-12)


def eight_bit_products(jaxpr):
    """Of a program: how many products of 8-bit numbers it holds, and of others."""
    found = [0, 0]
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found[any(v.aval.dtype.itemsize > 1 for v in eqn.invars)] += 1
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                found = [a + b for a, b in zip(found, eight_bit_products(inner), strict=True)]
    return found


@with_qwix
@pytest.mark.parametrize("products", ["int8", "fp8"])
def test_which_products_are_rounded(products):
    """Query, key, value, output, up, gate, down of each layer, and their input gradients; not head nor scores."""
    cfg = dataclasses.replace(WITHOUT_SCAN, activation="swiglu")
    model = build(products, cfg)
    batch = packed(2, LENGTH)

    def count(model):
        gradients = functools.partial(step.gradients, model, LanguageObjective(), layout=Layout(), seed=0, step=0)
        return eight_bit_products(jax.make_jaxpr(gradients)(model.shapes(), batch).jaxpr)

    low, high = count(model)
    assert low == 2 * 7 * cfg.num_layers
    assert count(build("native", cfg)) == [0, low + high]


@with_qwix
def test_generation_rounds_as_training_does():
    """Logits token by token from the cache are those of the whole row; and not those of the plain products."""
    model = build("int8")
    params, tokens = numbers(model), packed(2, LENGTH)["tokens"]
    whole, cached = jax.jit(model.apply), jax.jit(model.apply_cached, static_argnums=4)
    logits, cache = whole(params, tokens)[..., : CFG.vocab_size], {}
    for i in range(4):
        places = jnp.full((2, 1), i, jnp.int32)
        found, cache = cached(params, cache, tokens[:, i : i + 1], places, LENGTH)
        assert_close(found[:, 0, : CFG.vocab_size], logits[:, i], atol=1e-5)
    native = jax.jit(build("native").apply)(params, tokens)[..., : CFG.vocab_size]
    assert np.abs(native - logits).max() > 1e-3


@with_qwix
def test_models_with_other_products_are_other_models():
    """They are static arguments of compiled functions: equal ones would share a program."""
    models = [build(products) for products in ("native", "int8", "fp8")]
    assert len(set(models)) == 3
    assert models[1] == build("int8")


@functools.cache
def losses(products):
    """120 steps of Adam in bfloat16 on rows that count up from a random start by a random stride."""
    model = registry.build(decoder(), Layout(), Precision(jnp.dtype("float32"), jnp.dtype("bfloat16"), products))
    cfg, objective = OptimConfig(learning_rate=1e-2, warmup_steps=10), LanguageObjective(segments=False)
    tx = optim.make(cfg, 120, model.shapes(), model.axes())
    abstract = train_state.abstract(model, tx, Layout(), ema=False)
    train_step = step.make_train_step(
        model, objective, tx, optim.learning_rate(cfg, 120), Layout(), abstract, seed=0, accumulation=1, ema_decay=0.0
    )
    state, rng, found = train_state.init(model, tx, abstract, 0), np.random.default_rng(0), []
    for _ in range(120):
        start, stride = rng.integers(0, 30, (32, 1)), rng.integers(1, 4, (32, 1))
        row = ((start + stride * np.arange(17)) % 30).astype(np.int32)
        batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "loss_weights": np.ones((32, 16), np.float32)}
        state, values = train_step(state, batch)
        found.append(values["loss"])
    return np.array(jax.device_get(found))


@with_qwix
@pytest.mark.parametrize("products", ["int8", "fp8"])
def test_training_keeps_to_the_native_loss(products):
    found, native = losses(products), losses("native")
    assert np.isfinite(found).all() and found.tolist() != native.tolist()
    assert native[-10:].mean() < 0.4 * native[0]  # there was something to learn
    assert found[-10:].mean() < native[-10:].mean() + 0.05


# ------------------------------------------------------------------------------------------ without the library


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"precision\.products = 'int8'.*pip install 'llm-jax\[qwix\]'"):
        require_library("int8")
    require_library("native")
