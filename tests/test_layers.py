"""Linear, Embedding, norms and dropout against their formulas; how parameters start."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, build, decoder, mesh_layout

from llm_jax.config import from_dict
from llm_jax.errors import ConfigError
from llm_jax.kernels.elementwise import gelu, normalize
from llm_jax.models.layers import Embedding, Linear, Norm, dropout, product
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

FLOAT64 = Precision(jnp.dtype("float64"), jnp.dtype("float64"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# -------------------------------------------------------------------------------------------------- norms


def norm_by_hand(kind, x, eps, scale=1.0, bias=0.0):
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        v = x[place]
        if kind == "rmsnorm":
            out[place] = v / math.sqrt(sum(n * n for n in v) / len(v) + eps)
        else:
            mean = sum(v) / len(v)
            out[place] = (v - mean) / math.sqrt(sum((n - mean) ** 2 for n in v) / len(v) + eps)
    return out * scale + bias


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 3, 4, 8)], ids=len)
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_are_their_formulas(x64, kind, shape):
    x, scale, bias = 2 + 3 * normal(1, *shape), normal(2, 8), normal(3, 8)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    out = Norm(kind, 1e-2, FLOAT64, use_bias=True).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(out, norm_by_hand(kind, x, 1e-2, scale, bias), rtol=0, atol=1e-12)
    out = Norm(kind, 1e-2, FLOAT64, scale="none").apply({"params": {}}, jnp.asarray(x))
    np.testing.assert_allclose(out, norm_by_hand(kind, x, 1e-2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_in_bfloat16_take_statistics_in_float32(kind):
    """The mean square of 4096 numbers added up in bfloat16 would be off by several percent."""
    x = jnp.asarray(100 + normal(1, 1, 4096), jnp.bfloat16)
    out = Norm(kind, 1e-5, Precision(), scale="none").apply({"params": {}}, x)
    assert out.dtype == jnp.bfloat16
    expected = norm_by_hand(kind, np.asarray(x, np.float64), 1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0.005, atol=1e-4)


def test_norms_start_as_the_identity_and_name_their_axis():
    boxes = Norm("layernorm", 1e-5, Precision(), use_bias=True).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert boxes["scale"].names == boxes["bias"].names == ("norm",)
    assert boxes["scale"].value.tolist() == [1] * 4 and boxes["bias"].value.tolist() == [0] * 4


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_gradients_of_norms(x64, kind, with_scale):
    """The backward pass is written by hand: against differences of the formula."""
    x, cotangent = 2 + 3 * normal(1, 2, 3, 8), normal(2, 2, 3, 8)
    arguments = {"x": x} | ({"scale": normal(3, 8)} if with_scale else {})

    def loss(arguments):
        scale = arguments.get("scale")
        return (normalize(arguments["x"], scale, 1e-2, kind == "layernorm") * cotangent).sum()

    gradient = jax.jit(jax.grad(loss))(arguments)
    for name, value in arguments.items():
        expected = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = arguments | {name: value.copy()}
                moved[name][place] += step
                ends.append((norm_by_hand(kind, moved["x"], 1e-2, moved.get("scale", 1.0)) * cotangent).sum())
            expected[place] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=1e-8)


def test_gelu_and_its_gradient(x64):
    x = np.linspace(-6, 6, 49)
    phi = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    np.testing.assert_allclose(gelu(jnp.asarray(x)), x * phi, rtol=0, atol=1e-14)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    gradient = jax.vmap(jax.grad(gelu))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, phi + x * density, rtol=0, atol=1e-14)
    _, pull = jax.vjp(gelu, jnp.asarray(x))
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) == x.size, "the backward pass keeps the input alone"
    assert gelu(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_have_the_dtypes_of_what_they_belong_to(dtype):
    x, scale = jnp.ones((2, 4), dtype), jnp.ones(4, jnp.float32)
    dx, dscale = jax.grad(lambda x, scale: normalize(x, scale, 1e-5, True).sum().astype(jnp.float32), (0, 1))(x, scale)
    assert dx.dtype == x.dtype and dscale.dtype == scale.dtype


# --------------------------------------------------------------------------------------- linear, embedding


@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 3, 4)], ids=len)
def test_linear(x64, leading):
    x, kernel, bias = normal(1, *leading, 6), normal(2, 6, 7), normal(3, 7)
    layer = Linear(7, ("embed", "mlp"), nn.initializers.ones, Layout(), FLOAT64, use_bias=True)
    out = layer.apply({"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}, jnp.asarray(x))
    expected = [[sum(row[i] * kernel[i, j] for i in range(6)) + bias[j] for j in range(7)] for row in x.reshape(-1, 6)]
    np.testing.assert_allclose(out, np.reshape(expected, (*leading, 7)), rtol=0, atol=1e-12)


def test_linear_axes_and_dtypes():
    layer = Linear(7, ("embed", "mlp"), nn.initializers.ones, Layout(), Precision(jnp.dtype("float32")), use_bias=True)
    boxes = layer.init(jax.random.key(0), jnp.ones((1, 6), jnp.bfloat16))["params"]
    assert boxes["kernel"].names == ("embed", "mlp") and boxes["bias"].names == ("mlp",)
    assert boxes["kernel"].value.dtype == jnp.float32
    assert layer.apply({"params": nn.unbox(boxes)}, jnp.ones((1, 6), jnp.bfloat16)).dtype == jnp.bfloat16


def test_embedding():
    layer = Embedding(5, 3, ("vocab", "embed"), nn.initializers.ones, Layout(), Precision())
    table = jnp.asarray(normal(1, 5, 3), jnp.float32)
    bound = layer.bind({"params": {"table": table}})
    np.testing.assert_array_equal(bound(jnp.array([[4, 0, 4]])), [table[jnp.array([4, 0, 4])]])
    np.testing.assert_array_equal(bound.head(), table.T)
    np.testing.assert_array_equal(bound.first(2), table[:2])


# ------------------------------------------------------------------------------------------------ dropout


def drop(x, rate, seed=0, layout=None, rows=None, tokens=None):
    layout, rows = layout or Layout(), np.arange(len(x)) if rows is None else rows

    def call(x, key):
        return dropout(x, rate, key, rows, layout, "batch", "length", "embed", tokens=tokens)

    call = jax.jit(call, compiler_options=QUICK)
    return np.asarray(call(x, jax.random.key(seed)))


def test_dropout_keeps_the_share_and_the_mean():
    x = np.full((8, 64, 64), 3.0, np.float32)
    out = drop(x, 0.2)
    assert set(np.unique(out)) == {np.float32(0), np.float32(3 * 2**16 / 52_429)}  # 0.8, to 16 bits
    assert abs((out == 0).mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / out.size)
    for axis in range(3):  # no row, column or place is dropped as a whole
        others = tuple(other for other in range(3) if other != axis)
        assert (out == 0).mean(others).max() < 0.3 and (out == 0).mean(others).min() > 0.1


def test_dropout_is_a_function_of_its_key_on_every_mesh():
    x = np.ones((8, 4, 4), np.float32)
    expected = drop(x, 0.5, seed=1)
    np.testing.assert_array_equal(drop(x, 0.5, seed=1), expected)
    assert (drop(x, 0.5, seed=2) != expected).any()
    for sizes in ((8, 1, 1), (1, 4, 2), (2, 2, 2)):
        np.testing.assert_array_equal(drop(x, 0.5, seed=1, layout=mesh_layout(*sizes)), expected)


def test_a_row_keeps_its_dropout_in_whatever_batch_it_is():
    x = np.ones((8, 4, 4), np.float32)
    whole = drop(x, 0.5)
    assert len({row.tobytes() for row in whole}) == 8
    np.testing.assert_array_equal(drop(x[:3], 0.5, rows=np.array([6, 0, 3])), whole[[6, 0, 3]])


def test_a_token_keeps_its_dropout_wherever_it_stands():
    x, order = np.ones((8, 4, 4), np.float32), np.array([0, 3, 1, 2])
    whole = drop(x, 0.5, tokens=np.arange(4))
    assert len({token.tobytes() for token in whole.reshape(32, 4)}) > 10
    np.testing.assert_array_equal(drop(x, 0.5, tokens=order), whole[:, order])
    np.testing.assert_array_equal(drop(x, 0.5, tokens=np.arange(4), layout=mesh_layout(2, 1, 2, 2)), whole)


def test_dropout_only_in_training():
    x = jnp.ones((2, 4, 4))
    axes = ("batch", "length", "embed")
    np.testing.assert_array_equal(drop(x, 0.0), x)
    np.testing.assert_array_equal(dropout(x, 0.5, None, jnp.arange(2), Layout(), *axes), x)


def test_a_rate_of_one_is_refused():
    """It would divide by zero: everything dropped in the forward pass, NaN in the backward."""
    with pytest.raises(ConfigError, match="model.dropout.attention = 1.0"):
        from_dict({"model": {"dropout": {"attention": 1.0}}})


# ---------------------------------------------------------------------------------------------- how they start

WIDE = dict(vocab_size=500, embed_dim=192, num_heads=3, num_kv_heads=1, mlp_dim=512, num_layers=3, max_length=400)


def start(**changes):
    model = build(decoder(**{**WIDE, **changes}))
    return jax.tree.map(np.asarray, jax.jit(model.init, compiler_options=QUICK)(jax.random.key(3)))


def assert_std(x, expected):
    """Within four standard errors of a normal sample's deviation, and centred."""
    assert abs(x.std() / expected - 1) < 4 / math.sqrt(2 * x.size)
    assert abs(x.mean()) < 4 * expected / math.sqrt(x.size)


@pytest.mark.parametrize("residual", [True, False])
def test_normal_init(residual):
    params = start(
        positions="learned", init_std=0.03, residual_init_scale=residual, tie_embeddings=False, bias="all",
        norm="layernorm",
    )  # fmt: skip
    blocks = params["stack"]["blocks"]
    into_residual = 0.03 / math.sqrt(2 * 3) if residual else 0.03
    for kernel in (params["embedding"]["table"], params["positions"]["table"], params["head"]["kernel"]):
        assert_std(kernel, 0.03)
    for layer in range(3):
        for name in ("query", "key", "value"):
            assert_std(blocks["attention"][name]["kernel"][layer], 0.03)
        for name in ("up", "gate"):
            assert_std(blocks["mlp"][name]["kernel"][layer], 0.03)
        assert_std(blocks["attention"]["out"]["kernel"][layer], into_residual)
        assert_std(blocks["mlp"]["down"]["kernel"][layer], into_residual)
    first, second = blocks["mlp"]["up"]["kernel"][:2]
    assert (first != second).any()  # each layer draws its own
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key in ("scale", "bias"):
            assert (leaf == (path[-1].key == "scale")).all()


@pytest.mark.parametrize("residual", [True, False])
def test_torch_init(residual):
    params = start(positions="learned", init="torch", residual_init_scale=residual)
    blocks = params["stack"]["blocks"]
    scale = 1 / math.sqrt(2 * 3) if residual else 1.0
    for kernel, fan_in, factor in (
        (blocks["attention"]["query"]["kernel"], 192, 1.0),
        (blocks["mlp"]["up"]["kernel"], 192, 1.0),
        (blocks["attention"]["out"]["kernel"], 192, scale),
        (blocks["mlp"]["down"]["kernel"], 512, scale),
        (params["embedding"]["table"], 192, 1.0),  # tied: it starts as the head, a linear layer, does
    ):
        bound = factor / math.sqrt(fan_in)
        assert 0.99 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6)
        assert_std(kernel, bound / math.sqrt(3))
    assert_std(params["positions"]["table"], 1.0)  # torch.nn.Embedding
    assert_std(start(init="torch", tie_embeddings=False)["embedding"]["table"], 1.0)


def test_the_same_start_on_every_mesh():
    key, cfg = jax.random.key(5), decoder(embed_dim=32, num_heads=8)
    expected = jax.jit(build(cfg).init, compiler_options=QUICK)(key)
    for sizes in ((1, 8, 1), (2, 2, 2)):
        layout = mesh_layout(*sizes)
        model = build(cfg, layout)
        shardings = layout.parameter_shardings(model.shapes(), model.axes())
        made = jax.jit(model.init, out_shardings=shardings, compiler_options=QUICK)(key)
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_products_of_heads_are_those_of_their_numbers_side_by_side(x64, platform):
    """On a TPU heads stay apart: the product, its gradients and an adapter's are the same numbers."""
    layout = Layout(platform=platform)
    x, w, v = jnp.asarray(normal(1, 2, 3, 6)), jnp.asarray(normal(2, 6, 8)), jnp.asarray(normal(3, 8, 6))

    def through(x, w, v):
        heads = product(x, w.reshape(6, 4, 2), layout)
        assert heads.shape == (2, 3, 4, 2)
        return (product(heads, v.reshape(4, 2, 6), layout, over=2) ** 2).sum()

    found = jax.value_and_grad(through, (0, 1, 2))(x, w, v)
    expected = jax.value_and_grad(lambda x, w, v: ((x @ w @ v) ** 2).sum(), (0, 1, 2))(x, w, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)
