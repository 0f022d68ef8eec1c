"""Attention against its formulas in float64, the back ends against each other, and the selector's refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK

from llm_jax.config import DecoderConfig
from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import KERNELS, AttentionOptions, reference_attention, select
from llm_jax.kernels.masks import AttentionMask, causal_mask
from llm_jax.models.attention import Attention
from llm_jax.models.positions import rotary_angles
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [3, 4, 4, 4, 4, 4, 4, 4]], np.int32)

# ------------------------------------------------------------------------------- the formulas, written out


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention_by_hand(query, key, value, seen, softcap=0.0, bias=None):
    """One head: query (T, H), key (S, H), value (S, H), seen (T, S), bias (T, S), all float64."""
    out = np.zeros_like(query)
    for t in range(len(query)):
        keys = [s for s in range(len(key)) if seen[t, s]]
        scores = np.array([query[t] @ key[s] / math.sqrt(query.shape[1]) for s in keys])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[t, keys]
        for s, probability in zip(keys, softmax(scores), strict=True):
            out[t] += probability * value[s]
    return out


def seen_by_hand(segments, window, causal=True):
    length = len(segments)
    return np.array(
        [
            [
                segments[t] == segments[s] != 0 and (s <= t or not causal) and (not window or 0 <= t - s < window)
                for s in range(length)
            ]
            for t in range(length)
        ]
    )


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_is_the_formula(x64, kv_heads, softcap, with_bias):
    query, key, value = normal(1, 2, 8, 4, 6), normal(2, 2, 8, kv_heads, 6), normal(3, 2, 8, kv_heads, 6)
    bias = normal(4, 1, 4, 8, 8) if with_bias else None
    mask = causal_mask(8, jnp.asarray(SEGMENTS), window=3)
    out = reference_attention(*map(jnp.asarray, (query, key, value)), mask, softcap=softcap, bias=bias)
    for row in range(2):
        seen = seen_by_hand(SEGMENTS[row], window=3)
        real = SEGMENTS[row] != 0
        for head in range(4):
            kv = head * kv_heads // 4  # consecutive query heads share a key-value head
            expected = attention_by_hand(
                query[row, :, head],
                key[row, :, kv],
                value[row, :, kv],
                seen | ~real[:, None],  # padding: any value, as long as it is finite
                softcap,
                None if bias is None else bias[0, head],
            )
            np.testing.assert_allclose(out[row, real, head], expected[real], rtol=0, atol=1e-12)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if "cpu" in kernel.platforms], ids=lambda k: k.name)
def test_scores_are_not_rounded_to_16_bits(kernel):
    """Scores of about 60 have a step of 0.25 in bfloat16; the formula needs them to 0.01."""
    query, key, value = (jnp.asarray(4 * normal(seed, 1, 8, 2, 16), jnp.bfloat16) for seed in (1, 2, 3))
    out = kernel.attend(query, key, value, causal_mask(8))
    assert out.dtype == jnp.bfloat16
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (query, key, value)]
    seen = seen_by_hand(np.ones(8), 0)
    for head in range(2):
        expected = attention_by_hand(*(x[0, :, head] for x in exact), seen)
        np.testing.assert_allclose(np.asarray(out[0, :, head], np.float64), expected, rtol=0.02, atol=0.03)


# ----------------------------------------------------------------------------------------- multi-head layer


def multi_head_by_hand(cfg, params, x, seen, rotate=lambda x: x):
    """Concat(head_1, ..., head_N) W_O for one row x (T, D)."""
    size = cfg.head_dim or cfg.embed_dim // cfg.num_heads
    kv_heads = cfg.num_kv_heads or cfg.num_heads

    def project(name, heads):
        y = x @ params[name]["kernel"] + params[name].get("bias", 0.0)
        return y.reshape(len(x), heads, size)

    query, key, value = project("query", cfg.num_heads), project("key", kv_heads), project("value", kv_heads)
    if cfg.qk_norm:
        rms = lambda y: np.sqrt((y**2).mean(-1, keepdims=True) + cfg.norm_eps)  # noqa: E731
        query = query / rms(query) * params["query_norm"]["scale"]
        key = key / rms(key) * params["key_norm"]["scale"]
    query, key = rotate(query), rotate(key)
    heads = []
    for n in range(cfg.num_heads):
        kv = n // (cfg.num_heads // kv_heads)
        heads.append(attention_by_hand(query[:, n], key[:, kv], value[:, kv], seen, cfg.attention_softcap))
    y = np.concatenate(heads, -1) @ params["out"]["kernel"] + params["out"].get("bias", 0.0)
    return y * cfg.attention_output_scale


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2, "bias": "all"},
        {"num_kv_heads": 1, "bias": "qkv", "head_dim": 6},
        {"attention_softcap": 3.0, "attention_output_scale": 0.5},
        {"qk_norm": True, "positions": "rotary"},
    ],
    ids=str,
)
def test_multi_head_is_the_formula(x64, changes):
    cfg = DecoderConfig(embed_dim=16, num_heads=4, num_layers=2, **{"positions": "none", **changes})
    layer = Attention(cfg, Layout(), Precision(jnp.dtype("float64"), jnp.dtype("float64")))
    x, mask = normal(1, 2, 8, 16), causal_mask(8, jnp.asarray(SEGMENTS))
    positions = np.tile(np.arange(8), (2, 1))
    angles = rotary_angles(cfg.rope, 4, jnp.asarray(positions)) if cfg.positions == "rotary" else None

    def call(params):
        return layer.apply({"params": params}, jnp.asarray(x), mask, angles, None, train=False)

    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.asarray(x), mask, angles, None, train=False))
    leaves, tree = jax.tree.flatten(boxed["params"])
    params = jax.tree.unflatten(tree, [normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])
    params = {name: {key: box.value for key, box in part.items()} for name, part in params.items()}
    out = jax.jit(call, compiler_options=QUICK)(params)

    def rotate(y):  # (T, N, 4): pairs (y_0, y_2) and (y_1, y_3) turn as complex numbers
        if angles is None:
            return y
        turn = np.exp(1j * positions[0][:, None, None] * np.array([1.0, 0.01]))
        z = (y[..., :2] + 1j * y[..., 2:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    for row in range(2):
        real = SEGMENTS[row] != 0
        seen = seen_by_hand(SEGMENTS[row], 0) | ~real[:, None]
        expected = multi_head_by_hand(cfg, params, x[row], seen, rotate)
        # the angles are kept in float32, whatever the model computes in
        np.testing.assert_allclose(out[row][real], expected[real], rtol=0, atol=1e-11 if angles is None else 1e-5)


# ---------------------------------------------------------------------------------------------- back ends

MASKS = {
    "causal": (set(), lambda: causal_mask(8)),
    "window": ({"window"}, lambda: causal_mask(8, window=3)),
    "segments": ({"segments"}, lambda: causal_mask(8, jnp.asarray(SEGMENTS))),
    "segments and window": ({"segments", "window"}, lambda: causal_mask(8, jnp.asarray(SEGMENTS), 3)),
    "not causal": (set(), lambda: AttentionMask(jnp.arange(8), jnp.arange(8), causal=False)),
    "not causal, window": ({"window"}, lambda: AttentionMask(jnp.arange(8), jnp.arange(8), causal=False, window=3)),
    "not causal, segments": (
        {"segments"},
        lambda: AttentionMask(
            jnp.arange(8), jnp.arange(8), jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), causal=False
        ),
    ),
}
OTHERS = [kernel for kernel in KERNELS if "cpu" in kernel.platforms and kernel.name != "reference"]


def outputs_and_gradients(kernel, with_bias):
    """Of every mask that the kernel claims, by the mask's name, compiled as one program."""
    query, key, value = normal(1, 2, 8, 4, 8), normal(2, 2, 8, 2, 8), normal(3, 2, 8, 2, 8)
    cotangent = normal(5, 2, 8, 4, 8) * (SEGMENTS != 0)[:, :, None, None]  # nothing may use a padding query's value
    arguments = [query, key, value] + ([normal(4, 2, 4, 8, 8)] if with_bias else [])
    arguments = [jnp.asarray(x, jnp.float32) for x in arguments]

    def everything(arguments):
        results = {}
        for name, (needs, mask) in MASKS.items():
            if needs <= kernel.covers:

                def loss(query, key, value, bias=None, mask=mask):
                    out = kernel.attend(query, key, value, mask(), bias=bias)
                    return (out * cotangent.astype(np.float32)).sum(), out

                numbers = tuple(range(len(arguments)))
                gradients, out = jax.grad(loss, numbers, has_aux=True)(*arguments)
                results[name] = out * jnp.asarray(SEGMENTS != 0)[:, :, None, None], gradients
        return results

    return jax.jit(everything, compiler_options=QUICK)(arguments)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel", OTHERS, ids=lambda kernel: kernel.name)
def test_back_ends_agree_with_the_reference(kernel, with_bias):
    if with_bias and "bias" not in kernel.covers:
        return
    reference = next(kernel for kernel in KERNELS if kernel.name == "reference")
    ours, expected = outputs_and_gradients(kernel, with_bias), outputs_and_gradients(reference, with_bias)
    assert ours.keys() == expected.keys() == MASKS.keys()
    for name in MASKS:
        for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if "cpu" in kernel.platforms], ids=lambda k: k.name)
def test_documents_are_strangers_and_padding_is_finite(kernel):
    """The gradient of one document with respect to the other document is exactly 0, not merely small."""
    arrays = [jnp.asarray(3 * normal(seed, 2, 8, 2, 8), jnp.float32) for seed in (1, 2, 3)]

    def loss(query, key, value, which):
        out = kernel.attend(query, key, value, causal_mask(8, jnp.asarray(SEGMENTS)))
        return jnp.where(which[:, :, None, None], out, 0).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=QUICK)
    for document in (1, 2):
        for array in map(np.asarray, gradient(*arrays, SEGMENTS == document)):
            assert (array[SEGMENTS == document] != 0).any()
            assert (array[SEGMENTS != document] == 0).all()
    for array in gradient(*arrays, np.ones_like(SEGMENTS)):
        assert np.isfinite(array).all()


# ----------------------------------------------------------------------------------------------- selector


def test_auto_takes_the_first_that_covers_the_request():
    assert select("auto", AttentionOptions(), "cpu").name == "reference"
    assert select("auto", AttentionOptions(dtype="bfloat16"), "gpu").name == "cudnn"
    assert select("auto", AttentionOptions(dtype="bfloat16", segments=True, window=True), "gpu").name == "cudnn"
    assert select("auto", AttentionOptions(dtype="bfloat16", softcap=30.0), "gpu").name == "reference"
    assert select("auto", AttentionOptions(dtype="bfloat16", head_dim=256), "gpu").name == "reference"
    assert select("auto", AttentionOptions(dtype="bfloat16"), "tpu").name == "reference"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_auto_always_finds_one(platform, dtype):
    everything = AttentionOptions(True, True, True, True, 50.0, True, True, dtype, 20)
    assert select("auto", everything, platform).lacks(everything, platform) == []


@pytest.mark.parametrize(
    ("name", "options", "platform", "lacks"),
    [
        ("xla", AttentionOptions(softcap=50.0), "cpu", "softcap"),
        ("xla", AttentionOptions(dropout=True, cache=True), "cpu", "cache, dropout"),
        ("cudnn", AttentionOptions(dtype="bfloat16"), "cpu", "the platform cpu"),
        ("cudnn", AttentionOptions(), "gpu", "the dtype float32"),
        ("cudnn", AttentionOptions(dtype="bfloat16", bias=True), "gpu", "bias"),
        ("cudnn", AttentionOptions(dtype="bfloat16", split_length=True), "gpu", "split_length"),
        ("cudnn", AttentionOptions(dtype="bfloat16", head_dim=192), "gpu", "heads of 192 (multiples of 8 up to 128)"),
        ("cudnn", AttentionOptions(dtype="bfloat16", head_dim=20), "gpu", "heads of 20 (multiples of 8 up to 128)"),
    ],
)
def test_a_named_back_end_says_what_it_lacks(name, options, platform, lacks):
    with pytest.raises(ConfigError) as error:
        select(name, options, platform)
    message = str(error.value)
    assert f"model.attention_kernel={name!r}" in message
    assert f"it lacks {lacks}." in message
    assert "'auto'" in message and "'reference'" in message


def test_the_layer_refuses_what_its_back_end_cannot_do():
    cfg = DecoderConfig(embed_dim=8, num_heads=2, attention_kernel="xla", attention_softcap=5.0, positions="none")
    layer = Attention(cfg, Layout(), Precision())
    with pytest.raises(ConfigError, match="lacks softcap"):
        jax.eval_shape(
            lambda: layer.init(jax.random.key(0), jnp.zeros((1, 2, 8)), causal_mask(2), None, None, train=False)
        )
