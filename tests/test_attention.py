"""Attention against its formulas in float64, the back ends against each other, and the selector's refusals."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, decoder, mesh_layout

from llm_jax.config import DecoderConfig, MeshConfig
from llm_jax.config.kinds import layer_kinds
from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import KERNELS, AttentionOptions, select
from llm_jax.kernels.context import zigzag_order
from llm_jax.kernels.dense import reference_attention
from llm_jax.kernels.masks import AttentionMask, causal_mask
from llm_jax.models.attention import Attention, Shared, choose_kernel
from llm_jax.models.layers import Axes
from llm_jax.models.positions import rotary_angles
from llm_jax.precision import Precision
from llm_jax.sharding import Layout, abstract_layout

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [3, 4, 4, 4, 4, 4, 4, 4]], np.int32)
ON_CPU = [select(kernel.name, AttentionOptions(), "cpu") for kernel in KERNELS if "cpu" in kernel.platforms]
on_cpu = pytest.mark.parametrize("kernel", ON_CPU, ids=lambda kernel: kernel.name)

# ------------------------------------------------------------------------------- the formulas, written out


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention_by_hand(query, key, value, seen, softcap=0.0, bias=None, sink=None):
    """One head: query (T, H), key (S, H), value (S, H), seen (T, S), bias (T, S), a sink, all float64."""
    out = np.zeros_like(query)
    for t in range(len(query)):
        keys = [s for s in range(len(key)) if seen[t, s]]
        scores = np.array([query[t] @ key[s] / math.sqrt(query.shape[1]) for s in keys])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[t, keys]
        if sink is not None:
            scores = np.append(scores, sink)
        for s, probability in zip(keys, softmax(scores), strict=sink is None):  # a sink has no value
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
@pytest.mark.parametrize("with_sinks", [False, True])
def test_reference_is_the_formula(x64, kv_heads, softcap, with_bias, with_sinks):
    query, key, value = normal(1, 2, 8, 4, 6), normal(2, 2, 8, kv_heads, 6), normal(3, 2, 8, kv_heads, 6)
    bias = normal(4, 1, 4, 8, 8) if with_bias else None
    sinks = normal(6, 4) if with_sinks else None
    mask = causal_mask(8, jnp.asarray(SEGMENTS), window=3)
    out = reference_attention(
        *map(jnp.asarray, (query, key, value)), mask, softcap=softcap, bias=bias, sinks=jax.tree.map(jnp.asarray, sinks)
    )
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
                None if sinks is None else sinks[head],
            )
            np.testing.assert_allclose(out[row, real, head], expected[real], rtol=0, atol=1e-12)
    assert np.isfinite(out).all()


@on_cpu
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


def test_gradients_in_bfloat16_do_not_share_a_rounding():
    """Values far from 0: what is rounded before the softmax divides would move all scores of a query together."""
    means = (0, 0, 10, 0)
    arrays = [jnp.asarray(normal(i, 1, 256, 2, 32) + mean, jnp.bfloat16) for i, mean in enumerate(means)]
    places = np.arange(256)
    mask = AttentionMask(places, places)

    def gradient(dtype):
        *inputs, cotangent = (array.astype(dtype) for array in arrays)
        one = lambda q, k: jnp.vdot(reference_attention(q, k, inputs[2], mask), cotangent)  # noqa: E731
        return [np.asarray(g, np.float64) for g in jax.grad(one, (0, 1))(*inputs[:2])]

    for found, exact in zip(gradient(jnp.bfloat16), gradient(jnp.float32), strict=True):
        assert np.linalg.norm(found - exact) < 0.025 * np.linalg.norm(exact)


# ----------------------------------------------------------------------------------------- multi-head layer


def multi_head_by_hand(cfg, params, x, seen, rotate=lambda x: x):
    """Concat(head_1, ..., head_N) W_O for one row x (T, D)."""
    size = cfg.head_dim or cfg.embed_dim // cfg.num_heads
    kv_heads = cfg.num_kv_heads or cfg.num_heads

    def project(name, heads):
        y = x @ params[name]["kernel"] + params[name].get("bias", 0.0)
        return y.reshape(len(x), heads, size)

    query, key, value = project("query", cfg.num_heads), project("key", kv_heads), project("value", kv_heads)
    if cfg.qk_norm == "head":
        rms = lambda y: np.sqrt((y**2).mean(-1, keepdims=True) + cfg.norm_eps)  # noqa: E731
        query = query / rms(query) * params["query_norm"]["scale"]
        key = key / rms(key) * params["key_norm"]["scale"]
    query, key = rotate(query), rotate(key)
    heads = []
    for n in range(cfg.num_heads):
        kv = n // (cfg.num_heads // kv_heads)
        sink = params["sinks"][n] if cfg.attention_sinks else None
        heads.append(attention_by_hand(query[:, n], key[:, kv], value[:, kv], seen, cfg.attention_softcap, sink=sink))
    y = np.concatenate(heads, -1) @ params["out"]["kernel"] + params["out"].get("bias", 0.0)
    return y * cfg.attention_output_scale


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2, "bias": "all"},
        {"num_kv_heads": 1, "bias": "qkv", "head_dim": 6},
        {"attention_softcap": 3.0, "attention_output_scale": 0.5},
        {"qk_norm": "head", "positions": "rotary"},
        {"attention_sinks": True, "num_kv_heads": 2},
    ],
    ids=str,
)
def test_multi_head_is_the_formula(x64, changes):
    cfg = DecoderConfig(embed_dim=16, num_heads=4, num_layers=2, **{"positions": "none", **changes})
    layer = Attention(cfg, Layout(), Precision(jnp.dtype("float64"), jnp.dtype("float64")), layer_kinds(cfg)[0])
    x, mask = normal(1, 2, 8, 16), causal_mask(8, jnp.asarray(SEGMENTS))
    positions = np.tile(np.arange(8), (2, 1))
    angles = rotary_angles(cfg.rope, 4, jnp.asarray(positions)) if cfg.positions == "rotary" else None

    shared = Shared(mask, jnp.arange(2), angles)

    def call(params):
        return layer.apply({"params": params}, jnp.asarray(x), None, shared)

    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.asarray(x), None, shared))
    shapes = jax.tree.map(lambda box: box.value, boxed["params"], is_leaf=lambda node: isinstance(node, Axes))
    leaves, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(tree, [normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])
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

PLACES = np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32)
MASKS = {
    "causal": (set(), lambda: causal_mask(8)),
    "window": ({"window"}, lambda: causal_mask(8, window=3)),
    "segments": ({"segments"}, lambda: causal_mask(8, jnp.asarray(SEGMENTS))),
    "segments and window": ({"segments", "window"}, lambda: causal_mask(8, jnp.asarray(SEGMENTS), 3)),
    "not causal": (set(), lambda: AttentionMask(*PLACES, causal=False, in_order=True)),
    "not causal, window": (
        {"window", "two_sided_window"},
        lambda: AttentionMask(*PLACES, causal=False, window=4, in_order=True),
    ),
    "not causal, segments": (
        {"segments"},
        lambda: AttentionMask(*PLACES, *[jnp.asarray(SEGMENTS)] * 2, causal=False, in_order=True),
    ),
}
OTHERS = [kernel for kernel in ON_CPU if kernel.name != "reference"]


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


@on_cpu
def test_documents_are_strangers_and_padding_is_finite(kernel):
    """The gradient of one document with respect to the other document is exactly 0, not merely small."""
    arrays = [jnp.asarray(3 * normal(seed, 2, 8, 2, 8), jnp.float32) for seed in (1, 2, 3)]

    def loss(query, key, value, which):
        out = kernel.attend(query, key, value, causal_mask(8, jnp.asarray(SEGMENTS)))
        return jnp.where(which[:, :, None, None], out, 0).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=QUICK)
    for document in (1, 2):
        inside = document == SEGMENTS
        for array in map(np.asarray, gradient(*arrays, inside)):
            assert (array[inside] != 0).any()
            assert (array[~inside] == 0).all()
    for array in gradient(*arrays, np.ones_like(SEGMENTS)):
        assert np.isfinite(array).all()


@on_cpu
def test_what_a_back_end_does_not_cover_it_is_not_given(kernel):
    arrays = [jnp.ones((1, 4, 2, 8))] * 3
    empty = dict(softcap=0.0, bias=None, dropout=None, sinks=None)
    terms = dict(softcap=1.0, bias=jnp.zeros((1, 2, 4, 4)), dropout=lambda p: p, sinks=jnp.zeros(2))
    plain = kernel.attend(*arrays, causal_mask(4), **empty)
    for name, term in terms.items():
        if name in kernel.covers:
            assert kernel.attend(*arrays, causal_mask(4), **empty | {name: term}).shape == plain.shape
        else:
            with pytest.raises(ValueError, match=f"{kernel.name} attention was given {name}"):
                kernel.attend(*arrays, causal_mask(4), **empty | {name: term})


@pytest.mark.parametrize("name", ["xla", "cudnn"])
def test_rows_in_another_order_are_refused(name):
    """Whoever counts places itself must not be given a mask that says otherwise."""
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    with pytest.raises(ValueError, match="in order"):
        kernel.attend(*[jnp.ones((1, 8, 2, 8))] * 3, causal_mask(8, order=zigzag_order(8, 2)))


# ----------------------------------------------------------------------------------------------- selector

PLAIN = dict(dtype="bfloat16", head_dim=128, heads=32, kv_heads=8, length=4096)


@pytest.mark.parametrize(
    ("platform", "changes", "name"),
    [
        ("cpu", {}, "reference"),
        ("cpu", dict(length_parts=4), "ring"),
        ("cpu", dict(length_parts=4, segments=True, window=True, softcap=5.0, sinks=True), "ring"),
        ("cpu", dict(length_parts=4, length=4), "all_to_all"),  # no two chunks a device
        ("cpu", dict(length_parts=4, length=4, heads=6, kv_heads=6), "reference"),
        ("cpu", dict(length_parts=4, length=0), "ring"),
        ("cpu", dict(length_parts=4, dropout=True), "reference"),
        ("cpu", dict(length_parts=4, bias=True), "reference"),
        ("cpu", dict(length_parts=4, head_parts=2, kv_head_parts=1), "reference"),
        ("gpu", {}, "cudnn"),
        ("gpu", dict(segments=True, window=True), "cudnn"),
        ("gpu", dict(window=True, two_sided_window=True), "reference"),
        ("gpu", dict(segments=True, length=4095), "reference"),
        ("gpu", dict(length=4095), "cudnn"),
        ("gpu", dict(softcap=30.0), "reference"),
        ("gpu", dict(sinks=True), "reference"),
        ("gpu", dict(dtype="float32"), "reference"),
        ("gpu", dict(head_dim=256), "reference"),
        ("gpu", dict(cache=True), "reference"),
        ("gpu", dict(length_parts=2), "ring"),
        ("tpu", {}, "splash"),
        ("tpu", dict(segments=True, window=True, softcap=30.0, sinks=True, head_dim=20), "splash"),
        ("tpu", dict(dtype="float32"), "splash"),
        ("tpu", dict(window=True, two_sided_window=True), "splash"),
        ("tpu", dict(length=100), "reference"),
        ("tpu", dict(cache=True, length=1), "reference"),
        ("tpu", dict(length_parts=2), "ring"),
    ],
)
def test_auto_takes_the_fastest_that_covers_the_request(platform, changes, name):
    assert select("auto", AttentionOptions(**{**PLAIN, **changes}), platform).name == name


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_auto_always_finds_one(platform, dtype):
    everything = AttentionOptions(True, True, True, True, True, 50.0, True, True, dtype, 20, 7, 1, 9, 2, 3, 1)
    assert everything.needs() == {
        "segments", "window", "two_sided_window", "bias", "dropout", "softcap", "sinks", "split_length", "cache", "gqa",
    }  # fmt: skip
    assert select("auto", everything, platform).lacks(everything, platform) == []


@pytest.mark.parametrize(("platform", "inner"), [("cpu", "reference"), ("gpu", "cudnn"), ("tpu", "splash")])
def test_all_to_all_works_through_the_fastest_for_whole_rows(platform, inner):
    kernel = select("all_to_all", AttentionOptions(**PLAIN, length_parts=4, head_parts=2, kv_head_parts=2), platform)
    assert kernel.function.keywords["inner"].__self__.name == inner


@pytest.mark.parametrize(
    ("name", "changes", "platform", "lacks"),
    [
        ("xla", dict(softcap=50.0), "cpu", "softcap"),
        ("xla", dict(dropout=True, cache=True), "cpu", "cache, dropout"),
        ("xla", dict(sinks=True), "cpu", "sinks"),
        ("xla", dict(dtype="float64"), "cpu", "the dtype float64"),
        ("cudnn", {}, "cpu", "the platform cpu"),
        ("cudnn", dict(dtype="float32"), "gpu", "the dtype float32"),
        ("cudnn", dict(bias=True), "gpu", "bias"),
        ("cudnn", dict(sinks=True), "gpu", "sinks"),
        ("cudnn", dict(length_parts=2), "gpu", "split_length"),
        ("cudnn", dict(head_dim=192), "gpu", "heads of 192 (multiples of 8 up to 128)"),
        ("cudnn", dict(head_dim=20), "gpu", "heads of 20 (multiples of 8 up to 128)"),
        ("cudnn", dict(segments=True, length=15), "gpu", "packed rows of 15 tokens (an even number)"),
        (
            "cudnn",
            dict(head_parts=2),
            "gpu",
            "key-value heads that are split as the heads are (mesh.activation_rules)",
        ),
        ("splash", {}, "cpu", "the platform cpu"),
        ("ring", dict(dropout=True, bias=True), "cpu", "bias, dropout"),
        ("ring", dict(length_parts=4, length=12), "cpu", "rows of 12 tokens in 8 equal chunks, two a device"),
        ("all_to_all", dict(cache=True), "cpu", "cache"),
        ("all_to_all", dict(length_parts=4, length=18), "cpu", "rows of 18 tokens in 4 equal parts"),
        (
            "all_to_all",
            dict(length_parts=16, head_parts=2, kv_head_parts=2, kv_heads=6, heads=24),
            "cpu",
            "query heads enough (12 on a tensor part, with 3 key-value heads: a multiple of 48)",
        ),
    ],
)
def test_a_named_back_end_says_what_it_lacks(name, changes, platform, lacks):
    with pytest.raises(ConfigError) as error:
        select(name, AttentionOptions(**{**PLAIN, **changes}), platform)
    message = str(error.value)
    assert f"model.attention_kernel={name!r}" in message
    assert f"it lacks {lacks}." in message
    assert "'auto'" in message and "'reference'" in message


# ------------------------------------------------------------------------------------------ in a model


def test_the_layer_refuses_what_its_back_end_cannot_do():
    cfg = DecoderConfig(embed_dim=8, num_heads=2, attention_kernel="xla", attention_softcap=5.0, positions="none")
    layer, shared = Attention(cfg, Layout(), Precision()), Shared(causal_mask(2), jnp.arange(1))
    x = jnp.zeros((1, 2, 8))
    params = jax.eval_shape(lambda: nn.unbox(layer.init(jax.random.key(0), x, None, shared)))  # any back end's
    with pytest.raises(ConfigError, match="lacks softcap"):
        jax.eval_shape(lambda params: layer.apply(params, x, None, shared), params)


def choose(mesh=None, platform="cpu", dropout=False, cache=False, **changes):
    layout = Layout(platform=platform) if mesh is None else abstract_layout(mesh, 8, platform)
    request = dict(segments=True, length=16, dtype="bfloat16", dropout=dropout, cache=cache)
    cfg = decoder(**changes)
    return choose_kernel(cfg, layout, layer_kinds(cfg)[0], **request).name


def test_the_kernel_is_known_from_config_and_mesh():
    """No device has the shapes of this mesh."""
    assert choose() == "reference"
    assert choose(MeshConfig(sequence=4)) == "ring"
    assert choose(MeshConfig(sequence=4), cache=True) == "reference"
    assert choose(MeshConfig(sequence=4), attention_kernel="all_to_all") == "all_to_all"
    assert choose(MeshConfig(sequence=4), attention_kernel="ring", cache=True) == "reference"
    assert choose(platform="gpu", head_dim=64) == "cudnn"
    assert choose(platform="gpu", head_dim=64, attention_sinks=True) == "reference"
    for changes, lacks in (
        (dict(sliding_window=3, attention_sinks=True, attention_kernel="xla"), "lacks sinks"),
        (dict(positions="relative", attention_kernel="ring"), "lacks bias"),
        (dict(attention_kernel="ring", dropout_=True), "lacks dropout"),
        (dict(num_heads=2, attention_kernel="all_to_all"), "lacks query heads enough"),
    ):
        with pytest.raises(ConfigError, match=lacks):
            choose(MeshConfig(sequence=4), dropout=changes.pop("dropout_", False), **changes)


@pytest.mark.parametrize("kernel", ["ring", "all_to_all", "reference"])
def test_a_layer_on_a_mesh_is_the_layer(x64, kernel):
    """With sinks, whose parameter is split as the heads are; forward and gradients."""
    cfg = decoder(attention_kernel=kernel, attention_sinks=True, num_kv_heads=2, positions="none")
    x = jnp.asarray(normal(1, 2, 8, 16))
    weight = normal(5, 2, 8, 16) * (SEGMENTS != 0)[:, :, None]
    shared = Shared(causal_mask(8, jnp.asarray(SEGMENTS)), jnp.arange(2))
    results = []
    for layout in (Layout(), mesh_layout(fsdp=2, sequence=2, tensor=2)):
        layer = Attention(cfg, layout, Precision(jnp.dtype("float64"), jnp.dtype("float64")))
        one = x[:1, :1], None, Shared(causal_mask(1), jnp.arange(1))
        boxed = jax.jit(layer.init, compiler_options=QUICK)(jax.random.key(0), *one)["params"]
        assert boxed["sinks"].names == ("heads",) and not boxed["sinks"].value.any()
        params = jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda node: isinstance(node, Axes))
        params["sinks"] = jnp.asarray(normal(7, 4))

        def loss(params, x, layer=layer):
            return (layer.apply({"params": params}, x, None, shared) * weight).sum()

        results.append(jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=QUICK)(params, x))
    assert np.abs(results[0][1][0]["sinks"]).min() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), *results)
