"""Latent attention: against its equations as loops, decoding from what it keeps of a token, heads of two sizes."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, assert_close, build, decoder, mesh_layout, numbers

from llm_jax.config import Config, RopeConfig, check, override
from llm_jax.config.kinds import LayerKind
from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import KERNELS, of_one_size
from llm_jax.kernels.dense import reference_attention
from llm_jax.kernels.masks import AttentionMask
from llm_jax.models.attention import Shared
from llm_jax.models.latent import LatentAttention
from llm_jax.models.positions import rotary_angles, rotary_frequencies
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

ROWS, LENGTH, EMBED, HEADS = 2, 5, 16, 4
FORMS = {
    "plain": dict(latent=dict(kv_rank=8, rope_dim=2)),
    "queries of a latent, small values": dict(
        latent=dict(kv_rank=7, query_rank=5, rope_dim=4, value_dim=3), head_dim=5
    ),
    "large values, own scale": dict(latent=dict(kv_rank=6, rope_dim=2, value_dim=11), attention_scale=0.7),
    "a cap": dict(latent=dict(kv_rank=8, rope_dim=2), attention_softcap=1.5, attention_output_scale=0.5),
}


def inputs():
    x = np.random.default_rng(1).normal(size=(ROWS, LENGTH, EMBED))
    segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]], np.int32)
    positions = np.array([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]], np.int32)
    return x, segments, positions


def layer(cfg):
    module = LatentAttention(cfg, Layout(), Precision(jnp.dtype("float64"), jnp.dtype("float64")))
    x, segments, positions = inputs()
    places = jnp.arange(LENGTH)
    mask = AttentionMask(places, places, segments, segments)
    angles = rotary_angles(cfg.rope, cfg.latent.rope_dim, jnp.asarray(positions))
    shared = Shared(mask, jnp.arange(ROWS), angles)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, None, shared))["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: 0.4 * rng.normal(size=leaf.shape), shapes)
    return module, params, x, shared


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x**2) + eps) * scale


def turned(pairs, position, rope):
    """Pairs (x_i, x_{i + R / 2}), each by its own angle."""
    frequencies, _ = rotary_frequencies(rope, len(pairs))
    half, found = len(pairs) // 2, np.array(pairs)
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        first, second = pairs[i], pairs[half + i]
        found[i], found[half + i] = first * cos - second * sin, second * cos + first * sin
    return found


def by_loops(cfg, params, x, segments, positions):
    """Every query against every key that it sees, one number after the other."""
    p = jax.tree.map(np.asarray, params)
    size, rope_dim = cfg.head_dim or EMBED // HEADS, cfg.latent.rope_dim
    value_dim = cfg.latent.value_dim or size
    scale = cfg.attention_scale or (size + rope_dim) ** -0.5

    def token(b, t):
        source, name = x[b, t], "query"
        latent = rms(source @ p["latent_down"]["kernel"], p["latent_norm"]["scale"], cfg.norm_eps)
        if cfg.latent.query_rank:
            source = rms(source @ p["query_down"]["kernel"], p["query_norm"]["scale"], cfg.norm_eps)
            name = "query_up"
        query = (source @ p[name]["kernel"]).reshape(HEADS, size + rope_dim)
        key = (latent @ p["key_up"]["kernel"]).reshape(HEADS, size)
        value = (latent @ p["value_up"]["kernel"]).reshape(HEADS, value_dim)
        shared = turned(x[b, t] @ p["key_rope"]["kernel"], positions[b, t], cfg.rope)
        queries = [np.append(q[:size], turned(q[size:], positions[b, t], cfg.rope)) for q in query]
        return queries, [np.append(k, shared) for k in key], value

    y = np.zeros((ROWS, LENGTH, EMBED))
    for b in range(ROWS):
        tokens = [token(b, t) for t in range(LENGTH)]
        for t in range(LENGTH):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] != 0]
            heads = []
            for n in range(HEADS):
                scores = np.array([scale * tokens[t][0][n] @ tokens[s][1][n] for s in seen])
                if cfg.attention_softcap:
                    scores = cfg.attention_softcap * np.tanh(scores / cfg.attention_softcap)
                weights = np.exp(scores) / np.exp(scores).sum()
                heads.append(
                    sum((w * tokens[s][2][n] for w, s in zip(weights, seen, strict=True)), np.zeros(value_dim))
                )
            y[b, t] = np.concatenate(heads) @ p["out"]["kernel"] * cfg.attention_output_scale
    return y


@pytest.mark.parametrize("name", FORMS)
def test_the_layer_is_its_equations(x64, name):
    cfg = decoder(**FORMS[name])
    module, params, x, shared = layer(cfg)
    found = jax.jit(lambda params: module.apply({"params": params}, x, None, shared), compiler_options=QUICK)(params)
    _, segments, positions = inputs()
    real = (segments != 0)[..., None]
    expected = by_loops(cfg, params, x, segments, positions)
    np.testing.assert_allclose(np.where(real, found, 0), np.where(real, expected, 0), atol=1e-6)  # float32 angles


def test_layers_without_positions_do_not_turn(x64):
    cfg = decoder(**FORMS["plain"])
    module, params, x, shared = layer(cfg)
    module = dataclasses.replace(module, kind=LayerKind(positions=False))
    found = module.apply({"params": params}, x, None, shared)
    _, segments, positions = inputs()
    expected = by_loops(cfg, params, x, segments, np.zeros_like(positions))
    np.testing.assert_allclose(found[segments != 0], expected[segments != 0], atol=1e-10)


# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("name", FORMS)
def test_decoding_attends_in_the_latent_space(x64, name):
    """Prompts of two lengths, then a token a step: the logits of the whole rows; kept are latents and one key."""
    cfg = decoder(**FORMS[name], sliding_window=4, layer_pattern=("full", "window"))
    model = build(cfg, dtype="float64")
    params = numbers(model)
    tokens, lengths, slots = np.arange(20).reshape(2, 10) * 7 % 30, np.array([4, 2]), 16
    whole = jax.jit(model.apply, compiler_options=QUICK)(params, tokens)

    step = jax.jit(lambda *args: model.apply_cached(params, *args, slots), compiler_options=QUICK)
    positions = np.where(np.arange(4)[None] < lengths[:, None], np.arange(4)[None], slots)  # beyond: padding
    logits, cache = step({}, tokens[:, :4], positions)
    found = [logits[row, lengths[row] - 1] for row in range(2)]
    for made in range(5):
        places = lengths + made
        for row in range(2):
            np.testing.assert_allclose(found[row], whole[row, places[row] - 1], atol=1e-9)
        logits, cache = step(cache, tokens[np.arange(2), places][:, None], places[:, None])
        found = [logits[row, 0] for row in range(2)]
    kept = {name: leaf.shape[2:] for name, leaf in cache["stack"]["blocks"]["attention"].items()}
    latent = cfg.latent
    assert kept == {"cached_latent": (slots, latent.kv_rank), "cached_key_rope": (slots, 1, latent.rope_dim)}


def test_decoding_with_rounded_products_makes_the_keys_that_training_made():
    pytest.importorskip("qwix", reason="needs qwix (the extra `qwix`)")
    cfg = decoder(**FORMS["plain"])
    model = build(cfg)
    model = dataclasses.replace(
        model, module=dataclasses.replace(model.module, precision=Precision(products="int8"))
    )  # fmt: skip
    params, tokens = numbers(model), np.arange(12).reshape(2, 6)
    whole = model.apply(params, tokens)
    logits, _ = model.apply_cached(params, {}, tokens, np.broadcast_to(np.arange(6), (2, 6)), 8)
    np.testing.assert_allclose(logits, whole, atol=1e-4)


def test_text_on_a_mesh(x64):
    """Heads split over devices, the cache on each."""
    cfg = decoder(**FORMS["plain"], vocab_size=32)
    tokens, positions = np.arange(12).reshape(2, 6), np.broadcast_to(np.arange(6), (2, 6))
    found = []
    for layout in (Layout(), mesh_layout(tensor=4, fsdp=2)):
        model = build(cfg, layout, "float64")
        params = numbers(model)
        if layout.mesh is not None:
            params = jax.device_put(params, layout.parameter_shardings(model.shapes(), model.axes()))
        run = jax.jit(lambda p, model=model: model.apply_cached(p, {}, tokens, positions, 8)[0], compiler_options=QUICK)
        found.append(np.asarray(run(params)))
    np.testing.assert_allclose(found[1], found[0], atol=1e-10)


# --------------------------------------------------------------------------------------- heads of two sizes


@pytest.mark.parametrize("sizes", [(6, 4), (4, 7)], ids=["small values", "large values"])
def test_heads_of_one_size_are_the_same_attention(x64, sizes):
    size, value_size = sizes
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 5, 2, size))
    value = rng.normal(size=(1, 5, 2, value_size))
    mask = AttentionMask(jnp.arange(5), jnp.arange(5))
    expected = reference_attention(query, key, value, mask)
    filled = of_one_size(*map(jnp.asarray, (query, key, value)))
    assert {x.shape[-1] for x in filled} == {max(sizes)}
    np.testing.assert_allclose(reference_attention(*filled, mask)[..., :value_size], expected, atol=1e-12)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.name in ("reference", "xla", "ring")], ids=lambda k: k.name)
@pytest.mark.parametrize("sizes", [(6, 4), (4, 7)], ids=["small values", "large values"])
def test_every_back_end_takes_values_of_another_size(kernel, sizes):
    size, value_size = sizes
    rng = np.random.default_rng(0)
    query, key = jnp.asarray(rng.normal(size=(2, 1, 8, 2, size)), jnp.float32)
    value = jnp.asarray(rng.normal(size=(1, 8, 2, value_size)), jnp.float32)
    mask = AttentionMask(jnp.arange(8), jnp.arange(8), in_order=True)

    def run(attend):
        output, back = jax.vjp(lambda *given: attend(*given, mask), query, key, value)
        return output, *back(2 * output)  # the gradient of the sum of squares

    found, expected = (jax.jit(run, static_argnums=0)(attend) for attend in (kernel.attend, reference_attention))
    assert found[0].shape == (1, 8, 2, value_size)
    assert_close(found, expected, atol=2e-6)


# ------------------------------------------------------------------------------------------------ parameters


def test_parameters_and_their_axes():
    model = build(decoder(**FORMS["queries of a latent, small values"]))
    shapes, axes = model.shapes()["stack"]["blocks"]["attention"], model.axes()["stack"]["blocks"]["attention"]
    found = {
        name: (leaf.shape[1:], axes[name][part][1:]) for name, layer in shapes.items() for part, leaf in layer.items()
    }
    assert found == {
        "query_down": ((16, 5), ("embed", "rank")),
        "query_norm": ((5,), ("norm",)),
        "query_up": ((5, 4 * 9), ("latent", "heads")),
        "latent_down": ((16, 7), ("embed", "rank")),
        "latent_norm": ((7,), ("norm",)),
        "key_rope": ((16, 4), ("embed", "rank")),
        "key_up": ((7, 4 * 5), ("latent", "heads")),
        "value_up": ((7, 4 * 3), ("latent", "heads")),
        "out": ((4 * 3, 16), ("heads", "embed")),
    }


BASE = ("model.latent.kv_rank=8", "train.steps=1", "data.path=synthetic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.latent.kv_rank=0", "model.latent.rope_dim=8"], "model.latent.kv_rank is 0"),
        (["model.latent.rope_dim=7"], "an even number"),
        (["model.positions=learned"], "set positions=rotary"),
        (["model.num_kv_heads=2"], "model.num_kv_heads"),
        (["model.attention_sinks=True"], "which has no such form"),
        (["model.bias=all"], "which has no such form"),
        (["model.qk_norm=head"], "which has no such form"),
        (["model.rope.fraction=0.5"], "model.rope.fraction"),
    ],
)
def test_what_latent_attention_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(override(Config(), [*BASE, *changes]))


def test_heads_of_odd_size_rotate_in_their_other_part():
    cfg = override(Config(), [*BASE, "model.head_dim=5", "model.latent.rope_dim=6"])
    check(cfg)
    assert rotary_frequencies(RopeConfig(), cfg.model.latent.rope_dim)[0].shape == (3,)
