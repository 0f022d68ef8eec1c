"""Splash attention in Pallas's interpreter against the reference; that it runs on TPUs alone, on shapes it can take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, mesh_layout

from llm_jax.config import MeshConfig
from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import AttentionOptions, select
from llm_jax.kernels.dense import reference_attention
from llm_jax.kernels.masks import AttentionMask, causal_mask
from llm_jax.kernels.splash import band, splash_attention
from llm_jax.kernels.split import Split
from llm_jax.sharding import Layout, make_layout

LENGTH = 256  # two blocks of the smallest size
BORDERS = (0, 40, 130, 131, 240)  # segments that cross the blocks' border; the last is padding


def segments(rows=1):
    ids = np.searchsorted(BORDERS, np.arange(LENGTH), side="right")
    ids[BORDERS[-1] :] = 0
    return jnp.asarray(np.tile(ids, (rows, 1)), jnp.int32)


def draw(rows=1, heads=2, kv_heads=1, size=8, dtype="float32"):
    """Query, key, value, sinks, and the gradient of the output, which nothing gives to padding."""
    rng = np.random.default_rng(0)
    shapes = [(rows, LENGTH, count, size) for count in (heads, kv_heads, kv_heads)]
    query, key, value = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return query, key, value, jnp.asarray(rng.normal(size=heads), "float32")


def numbers(attend, query, key, value, sinks, mask, softcap):
    """The output and the gradients of query, key, value and sinks, those of padding left out."""
    real = 1 if mask.query_segments is None else (mask.query_segments != 0)[..., None, None]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=query.shape), "float32") * real

    def loss(query, key, value, sinks):
        out = attend(query, key, value, mask, softcap=softcap, sinks=sinks)
        return (out * weight).sum(), out * real

    arrays = (query, key, value) + (() if sinks is None else (sinks,))
    run = jax.grad(lambda *x: loss(*x, *[None] * (4 - len(x))), range(len(arrays)), has_aux=True)
    return jax.jit(run, compiler_options=QUICK)(*arrays)


def check(split, arrays, mask, softcap=0.0, with_sinks=True, atol=2e-6):
    query, key, value, sinks = arrays
    splash = functools.partial(splash_attention, split=split, interpret=True)
    sinks = sinks if with_sinks else None
    found = numbers(splash, *arrays[:3], sinks, mask, softcap)
    wide = [x.astype("float32") for x in arrays[:3]]
    expected = numbers(reference_attention, *wide, sinks, mask, softcap)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(np.abs(b).max(), 1))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_the_reference(packed, window, kv_heads):
    """Soft-cap and sinks come in so that every pair of the five choices occurs."""
    mask = causal_mask(LENGTH, segments() if packed else None, window)
    softcap = 0.7 if packed == (window == 0) else 0.0
    check(Split(), draw(kv_heads=kv_heads), mask, softcap, with_sinks=packed == (kv_heads == 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 130])
def test_the_mask_of_blocks_is_the_mask(window, causal):
    """Blocks that are as far from the diagonal as another are not worked out again."""
    index = jnp.arange(384)
    expected = AttentionMask(index, index, causal=causal, window=window or 384 * (not causal))
    mask, expected = band(384, expected.reach()), np.asarray(expected.dense()[0])
    blocks = [[mask[slice(i, i + 128), slice(j, j + 128)] for j in (0, 128, 256)] for i in (0, 128, 256)]
    assert (np.block(blocks) == expected).all()
    assert blocks[2][1] is blocks[1][0]


@pytest.mark.parametrize("window", [0, 100])
def test_both_ways(window):
    index = jnp.arange(LENGTH)
    mask = AttentionMask(index, index, segments(), segments(), causal=False, window=window, in_order=True)
    check(Split(), draw(), mask)


def test_bfloat16():
    """Within 2% of the largest number; bfloat16 has 8 bits (0.4%)."""
    check(Split(), draw(dtype="bfloat16"), causal_mask(LENGTH, segments()), softcap=2.0, atol=2e-2)


def test_rows_and_heads_on_several_devices():
    split = Split.of(mesh_layout(fsdp=2, tensor=2))
    check(split, draw(rows=2, heads=4, kv_heads=2), causal_mask(LENGTH, segments(2)))


def test_under_vmap_over_stages():
    """As a pipeline runs its blocks: every stage on rows of its own."""
    layout = make_layout(MeshConfig(stage=2, data=1, fsdp=2, tensor=2), jax.devices())
    splash = functools.partial(splash_attention, split=Split.of(layout), interpret=True)
    arrays = [jnp.stack([x, -x]) for x in draw(rows=2, heads=4, kv_heads=2)]
    ids = jnp.stack([segments(2), jnp.ones_like(segments(2))])

    def gradient(attend, stages):
        def stage(query, key, value, sinks, ids):
            real = (ids != 0)[..., None, None]
            return attend(query, key, value, causal_mask(LENGTH, ids), sinks=sinks) * real

        def loss(*arrays):
            return jnp.square(stages(stage)(*arrays, ids)).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)), compiler_options=QUICK)(*arrays)

    found = gradient(splash, functools.partial(jax.vmap, spmd_axis_name="stage"))
    expected = gradient(reference_attention, jax.vmap)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), found, expected)


def test_rows_in_another_order_are_refused():
    mask = causal_mask(LENGTH, order=np.arange(LENGTH)[::-1])
    with pytest.raises(ValueError, match="in order"):
        splash_attention(*draw()[:3], mask, Split())


# ------------------------------------------------------------------------------------------- selection


def options(**changes):
    return AttentionOptions(**{"length": 1024, "dtype": "bfloat16", "head_dim": 128, **changes})


def test_auto_takes_it_on_a_tpu():
    assert select("auto", options(segments=True, window=True, softcap=5.0, sinks=True), "tpu").name == "splash"
    assert select("auto", options(bias=True), "tpu").name == "reference"
    assert select("auto", options(), "cpu").name == "reference"


@pytest.mark.parametrize(
    ("changes", "platform", "lacks"),
    [
        ({}, "cpu", "the platform cpu"),
        ({}, "gpu", "the platform gpu"),
        ({"length": 1000}, "tpu", "rows of 1000 tokens (multiples of 128)"),
        ({"dropout": True, "bias": True, "cache": True}, "tpu", "bias, cache, dropout"),
        ({"length_parts": 2}, "tpu", "split_length"),
        ({"dtype": "float64"}, "tpu", "the dtype float64"),
        ({"head_parts": 2}, "tpu", "key-value heads that are split as the heads are (mesh.activation_rules)"),
    ],
)
def test_refusals(changes, platform, lacks):
    with pytest.raises(ConfigError) as error:
        select("splash", options(**changes), platform)
    assert f"it lacks {lacks}. Use 'auto'" in str(error.value)


def test_there_is_no_interpreter_in_a_run():
    """On a machine without TPU the selected kernel would run the real one, and say so."""
    kernel = select("splash", options(), "tpu")
    with pytest.raises(Exception, match="interpret"):
        kernel.attend(*draw()[:3], causal_mask(LENGTH), layout=Layout())
