"""Attention with the length split over devices, against the reference on one device; zig-zag order; memory."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import QUICK, mesh_layout

from llm_jax.config import MeshConfig
from llm_jax.errors import ConfigError
from llm_jax.kernels.context import all_to_all_attention, ring_attention, zigzag_order
from llm_jax.kernels.dense import jax_attention, reference_attention
from llm_jax.kernels.masks import AttentionMask, causal_mask
from llm_jax.kernels.split import Split
from llm_jax.sharding import Layout, make_layout

KERNELS = {
    "ring": functools.partial(ring_attention, tile=2),
    "all_to_all": functools.partial(all_to_all_attention, inner=reference_attention),
}
both = pytest.mark.parametrize("kernel", KERNELS)

# Two rows of 16: segments that cross the borders of every split, one row with padding at its end and in its middle.
SEGMENTS = np.array(
    [[1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2]]
)


def draw(batch=2, length=16, heads=8, kv_heads=4, size=4, dtype="float64"):
    """Query, key, value, and the gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = [(batch, length, count, size) for count in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def draw_sinks(heads=8):
    return jnp.asarray(np.random.default_rng(1).normal(size=heads))


def make_mask(segments=None, index=None, key_index=None, length=16, causal=True, window=0):
    index = np.arange(length) if index is None else index
    key_index = index if key_index is None else key_index
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    places = jnp.asarray(index, jnp.int32), jnp.asarray(key_index, jnp.int32)
    return AttentionMask(*places, segments, segments, causal, window)


def of_padding_zero(x, mask):
    """What queries see nothing gives is anything finite: it is left out of comparisons."""
    return x if mask.query_segments is None else jnp.where((mask.query_segments != 0)[..., None, None], x, 0)


def numbers(attend, arrays, mask, sinks=None):
    """The output and the gradients of query, key, value and sinks, of a jitted `attend`."""

    def run(query, key, value, d_out, mask, sinks):
        def masked(query, key, value, sinks):
            return of_padding_zero(attend(query, key, value, mask, sinks=sinks), mask)

        out, pull = jax.vjp(masked, query, key, value, sinks)
        return dict(zip(("out", "query", "key", "value", "sinks"), (out, *pull(d_out)), strict=True))

    found = jax.jit(run, compiler_options=QUICK)(*arrays, mask, sinks)
    return {name: x for name, x in found.items() if x is not None}


def on_mesh(kernel, layout, **options):
    return functools.partial(KERNELS[kernel], split=Split.of(layout), **options)


def check(kernel, layout, arrays, mask, softcap=0.0, sinks=None, atol=1e-10):
    found = numbers(on_mesh(kernel, layout, softcap=softcap), arrays, mask, sinks)
    exact = [x.astype("float64") for x in arrays]
    expected = numbers(functools.partial(reference_attention, softcap=softcap), exact, mask, sinks)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == (sinks if name == "sinks" else arrays[0]).dtype
        a, b = np.asarray(found[name], np.float64), np.asarray(expected[name])
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(b).max(), err_msg=name)


# --------------------------------------------------------------------------------------------- exactness

CASES = {  # sizes of the mesh, the mask, other options
    "8 devices": (dict(sequence=8), dict(segments=SEGMENTS), {}),
    "window across shards": (dict(sequence=8), dict(window=5), {}),
    "window to both sides across shards": (dict(sequence=8), dict(window=6, causal=False), {}),
    "both ways": (dict(sequence=4), dict(segments=SEGMENTS, causal=False), {}),
    "data axis": (dict(data=2, sequence=4), dict(segments=SEGMENTS), {}),
    "tensor axis": (dict(sequence=2, tensor=4), dict(segments=SEGMENTS), {}),
    "one part": (dict(fsdp=2, tensor=2), dict(segments=SEGMENTS), {}),
    "every axis": (dict(fsdp=2, sequence=2, tensor=2), dict(segments=SEGMENTS, window=6), dict(sinks=True)),
}


@both
@pytest.mark.parametrize("case", CASES)
def test_the_reference_to_the_last_digits(x64, kernel, case):
    sizes, mask, options = CASES[case]
    options = options | ({"sinks": draw_sinks()} if "sinks" in options else {})
    check(kernel, mesh_layout(**sizes), draw(), make_mask(**mask), **options)


@both
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["", "packed"])
def test_combinations_of_what_they_claim(x64, kernel, segments, window):
    """Segments, window, soft-cap, sinks, shared key heads: that half of the 32 where all choices of any four occur."""
    for softcap, sinks in itertools.product([0.0, 0.7], [None, draw_sinks()]):
        odd = (segments is not None) ^ (window != 0) ^ (softcap != 0) ^ (sinks is not None)
        arrays = draw(kv_heads=2 if odd else 8)
        check(kernel, mesh_layout(sequence=4), arrays, make_mask(segments, window=window), softcap, sinks)


@both
def test_without_a_mesh(x64, kernel):
    check(kernel, Layout(), draw(), make_mask(SEGMENTS, window=6), 0.7, draw_sinks())


@both
def test_a_sink_beyond_all_scores_takes_all_weight(x64, kernel):
    attend = on_mesh(kernel, mesh_layout(sequence=2))
    found = numbers(attend, draw(), make_mask(), jnp.full(8, 1e4))
    assert not any(np.asarray(x).any() for x in found.values())
    check(kernel, mesh_layout(sequence=2), draw(), make_mask(), sinks=jnp.full(8, -1e4))  # and one below, none


@both
def test_all_queries_share_one_key_head(x64, kernel):
    check(kernel, mesh_layout(sequence=4), draw(kv_heads=1), make_mask(SEGMENTS))


def test_key_heads_that_devices_divide_unevenly(x64):
    """Three heads for two devices: each is sent twice, and two of three halves are used."""
    check("all_to_all", mesh_layout(sequence=2), draw(heads=12, kv_heads=3), make_mask(SEGMENTS))


@both
@pytest.mark.parametrize("window", [0, 5])
def test_rows_in_zigzag_order(x64, kernel, window):
    """Reordered rows with reordered places give the reordered result of the rows as they were."""
    order = zigzag_order(16, 4)
    back = np.argsort(order)
    arrays = draw()
    attend = on_mesh(kernel, mesh_layout(sequence=4))
    reordered = make_mask(SEGMENTS[:, order], order, window=window)
    found = numbers(attend, [x[:, order] for x in arrays], reordered)
    expected = numbers(reference_attention, arrays, make_mask(SEGMENTS, window=window))
    for name in expected:
        np.testing.assert_allclose(found[name][:, back], expected[name], rtol=0, atol=1e-10, err_msg=name)


@both
def test_places_of_each_row_and_other_lengths(x64, kernel):
    """Queries (B, T) at places of their own, against more keys than queries."""
    query, _, _, d_out = draw(length=8)
    _, key, value, _ = draw(length=16)
    index = np.array([[9, 8, 3, 2, 15, 0, 1, 7], [5, 4, 6, 7, 8, 9, 10, 11]])
    key_index = np.random.default_rng(1).permutation(16)
    check(kernel, mesh_layout(fsdp=2, sequence=4), (query, key, value, d_out), make_mask(None, index, key_index))


@both
def test_bfloat16(x64, kernel):
    """Within 2% of the largest number of the float64 result; bfloat16 has 8 bits (0.4%)."""
    sinks = draw_sinks().astype("float32")
    check(kernel, mesh_layout(sequence=4), draw(dtype="bfloat16"), make_mask(SEGMENTS), sinks=sinks, atol=2e-2)


@pytest.mark.parametrize("tile", [1, 3, 512])
def test_any_tile(x64, tile):
    layout = mesh_layout(sequence=2)
    expected = numbers(reference_attention, draw(), make_mask(SEGMENTS))
    found = numbers(on_mesh("ring", layout, tile=tile), draw(), make_mask(SEGMENTS))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-10, err_msg=name)


@both
def test_padding_stays_finite(kernel):
    """Also where a whole row is padding, and where its output is given a gradient."""
    arrays = draw(dtype="float32")
    mask = make_mask(np.zeros_like(SEGMENTS))
    attend = on_mesh(kernel, mesh_layout(sequence=4))
    out, pull = jax.vjp(jax.jit(lambda *qkv: attend(*qkv, mask)), *arrays[:3])
    assert all(np.isfinite(x).all() for x in (out, *pull(arrays[3])))
    if kernel == "ring":
        assert not any(np.asarray(x).any() for x in (out, *pull(arrays[3])))


# --------------------------------------------------------------------------------------------- pipeline


@pytest.mark.parametrize(
    ("kernel", "own_mask"),
    [("ring", False), ("ring", True), ("all_to_all", False), ("all_to_all", True), ("reference", True)],
)
def test_under_vmap_over_stages(x64, kernel, own_mask):
    """As a pipeline runs its blocks: every stage on rows of its own, with a mask of its own or the same."""
    layout = make_layout(MeshConfig(stage=2, data=1, fsdp=2, sequence=2), jax.devices())
    on_stages = reference_attention if kernel == "reference" else on_mesh(kernel, layout)
    segments = jnp.asarray(np.stack([SEGMENTS, SEGMENTS[::-1]]) if own_mask else SEGMENTS, jnp.int32)
    places = make_mask(window=6)
    arrays = [jnp.stack([x, 2 * x[::-1]]) for x in draw()[:3]]
    sinks = jnp.stack([draw_sinks(), -draw_sinks()])
    place = NamedSharding(layout.mesh, PartitionSpec("stage", "fsdp", "sequence"))

    def stage(query, key, value, sinks, segments, attend):
        mask = dataclasses.replace(places, query_segments=segments, key_segments=segments)
        return of_padding_zero(attend(query, key, value, mask, sinks=sinks), mask)

    def all_at_once(*arrays):
        axes = (0, 0, 0, 0, 0 if own_mask else None)
        return jax.vmap(functools.partial(stage, attend=on_stages), axes, spmd_axis_name="stage")(*arrays)

    def one_by_one(*arrays):
        *arrays, segments = arrays
        each = segments if own_mask else [segments] * 2
        return jnp.stack([stage(*x, reference_attention) for x in zip(*arrays, each, strict=True)])

    def gradient(run):
        def loss(*arrays):
            out = run(*arrays, segments)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True), compiler_options=QUICK)

    found = gradient(all_at_once)(*(jax.device_put(x, place) for x in arrays), sinks)
    expected = gradient(one_by_one)(*arrays, sinks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found, expected)


# --------------------------------------------------------------------------------------------- work


def test_the_ring_leaves_out_what_no_query_sees():
    """Keys of nan are seen by nobody: computed and masked they would still spoil sums."""
    query, key, value, d_out = draw(dtype="float32")
    value = value.at[:, 12:].set(np.nan)
    attend = on_mesh("ring", mesh_layout(sequence=4))
    found = numbers(attend, (query, key, value, d_out.at[:, 12:].set(0)), make_mask())
    assert np.isfinite(found["out"][:, :12]).all() and np.isnan(found["out"][:, 12:]).all()


def test_zigzag_order_by_hand():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag_order(8, 4).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    assert zigzag_order(6, 1).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match="12 tokens .* multiple of 8"):
        zigzag_order(12, 4)


def test_zigzag_gives_every_device_the_same_work():
    seen = (zigzag_order(64, 4) + 1).reshape(4, -1).sum(1)  # keys that the queries of each device see
    assert len(set(seen.tolist())) == 1


# --------------------------------------------------------------------------------------------- memory


@functools.cache
def compiled(parts, length, tile=32):
    """Forward and backward, packed, for float32 arrays (1, length, 2, 4)."""
    layout = mesh_layout(sequence=parts)
    attend = on_mesh("ring", layout, tile=tile)

    def gradients(query, key, value, d_out, segments):
        index = jnp.arange(length)
        mask = AttentionMask(index, index, segments, segments)
        return jax.vjp(lambda *qkv: attend(*qkv, mask), query, key, value)[1](d_out)

    sharding = NamedSharding(layout.mesh, PartitionSpec(None, "sequence"))

    def shape(*sizes, dtype="float32"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    x, segments = shape(1, length, 2, 4), shape(1, length, dtype="int32")
    return jax.jit(gradients, compiler_options=QUICK).lower(x, x, x, x, segments).compile()


def temp_bytes(*args):
    return compiled(*args).memory_analysis().temp_size_in_bytes


def test_memory_of_a_device_does_not_grow_with_the_ring():
    """128 tokens a device, so total memory is linear in the length."""
    two, four, eight = temp_bytes(2, 256), temp_bytes(4, 512), temp_bytes(8, 1024)
    assert two <= four <= 1.05 * two and eight <= 1.05 * two


def test_memory_of_a_device_is_linear_in_its_tokens():
    """Twice the tokens on as many devices: a matrix of scores would make it fourfold."""
    one, two, four = temp_bytes(4, 512), temp_bytes(4, 1024), temp_bytes(4, 2048)
    assert two < 2 * one and four < 2 * two


def test_no_matrix_of_scores_is_ever_made():
    """No array has two axes of even one device's tokens, nor more numbers than all blocks of a tile would take."""
    shapes = re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", compiled(4, 2048).as_text())
    shapes = {tuple(map(int, shape.split(","))) for shape in shapes}
    assert (1, 512, 2, 4) in shapes
    assert not [shape for shape in shapes if sum(size >= 512 for size in shape) > 1]
    assert max(map(np.prod, shapes)) <= 512 * 2 * 4


# --------------------------------------------------------------------------------------------- refusals


@both
def test_lengths_that_do_not_split_are_refused(kernel):
    with pytest.raises(ConfigError, match=r"18 queries .* 4 devices of mesh\.sequence.*multiple of 4"):
        on_mesh(kernel, mesh_layout(sequence=4))(*draw(length=18, dtype="float32")[:3], make_mask(length=18))


@both
def test_heads_that_do_not_split_over_tensor_are_refused(kernel):
    with pytest.raises(ConfigError, match=r"2 heads of the keys .* 4 devices of mesh\.tensor"):
        on_mesh(kernel, mesh_layout(sequence=2, tensor=4))(*draw(kv_heads=2, dtype="float32")[:3], make_mask())


def test_batches_that_do_not_split_are_refused():
    with pytest.raises(ConfigError, match=r"2 rows does not split over the 4 devices .*train\.global_batch_size"):
        on_mesh("ring", mesh_layout(sequence=2, fsdp=4))(*draw(dtype="float32")[:3], make_mask())


def test_all_to_all_refuses_too_few_heads():
    with pytest.raises(ConfigError, match="2 on a tensor part, with 2 key-value heads: a multiple of 4.* Take ring"):
        on_mesh("all_to_all", mesh_layout(sequence=4, tensor=2))(*draw(heads=4, dtype="float32")[:3], make_mask())


def test_a_length_over_two_axes_is_refused():
    layout = mesh_layout(sequence=2, tensor=2)
    rules = dict(layout.activation_rules) | {"length": ("sequence", "tensor")}
    with pytest.raises(ConfigError, match="split 'length' over sequence and tensor"):
        Split.of(dataclasses.replace(layout, activation_rules=tuple(rules.items())))


def test_all_to_all_hands_unordered_rows_to_nothing_that_counts_places_itself():
    attend = on_mesh("all_to_all", mesh_layout(sequence=4), inner=jax_attention("xla"))
    arrays = draw(dtype="float32")
    with pytest.raises(ValueError, match="in order"):
        jax.eval_shape(attend, *arrays[:3], causal_mask(16, order=zigzag_order(16, 4)))
    found = jax.jit(attend, compiler_options=QUICK)(*arrays[:3], causal_mask(16))
    np.testing.assert_allclose(found, reference_attention(*arrays[:3], causal_mask(16)), rtol=0, atol=1e-6)
