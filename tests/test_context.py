"""Attention with the length split over devices, against the reference on one device; zig-zag order; memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import QUICK, mesh_layout

from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import reference_attention
from llm_jax.kernels.context import Split, ring_attention, ulysses_attention, zigzag_inverse, zigzag_order
from llm_jax.kernels.masks import AttentionMask

KERNELS = {"ring": functools.partial(ring_attention, tile=2), "ulysses": ulysses_attention}
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


def make_mask(segments=None, index=None, key_index=None, length=16, causal=True, window=0):
    index = np.arange(length) if index is None else index
    key_index = index if key_index is None else key_index
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    places = jnp.asarray(index, jnp.int32), jnp.asarray(key_index, jnp.int32)
    return AttentionMask(*places, segments, segments, causal, window)


def of_padding_zero(x, mask):
    """What queries see nothing gives is anything finite: it is left out of comparisons."""
    return x if mask.query_segments is None else jnp.where((mask.query_segments != 0)[..., None, None], x, 0)


def numbers(attend, arrays, mask):
    """The output and the gradients of query, key and value, of a jitted `attend`."""

    def run(query, key, value, d_out, mask):
        out, pull = jax.vjp(lambda *qkv: of_padding_zero(attend(*qkv, mask), mask), query, key, value)
        return dict(zip(("out", "query", "key", "value"), (out, *pull(d_out)), strict=True))

    return jax.jit(run, compiler_options=QUICK)(*arrays, mask)


def on_mesh(kernel, layout, **options):
    rules = dict(layout.activation_rules)
    split = Split(layout.mesh, "sequence", rules["batch"], rules["heads"])
    return functools.partial(KERNELS[kernel], split=split, **options)


def check(kernel, layout, arrays, mask, softcap=0.0, atol=1e-10):
    found = numbers(on_mesh(kernel, layout, softcap=softcap), arrays, mask)
    exact = [x.astype("float64") for x in arrays]
    expected = numbers(functools.partial(reference_attention, softcap=softcap), exact, mask)
    for name in expected:
        assert found[name].dtype == arrays[0].dtype
        a, b = np.asarray(found[name], np.float64), np.asarray(expected[name])
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * np.abs(b).max(), err_msg=name)


# --------------------------------------------------------------------------------------------- exactness

CASES = {  # sizes of the mesh, the mask, other options
    "2 devices": (dict(sequence=2), {}, {}),
    "8 devices": (dict(sequence=8), {}, {}),
    "packed": (dict(sequence=4), dict(segments=SEGMENTS), {}),
    "packed, 8 devices": (dict(sequence=8), dict(segments=SEGMENTS), {}),
    "packed, window": (dict(sequence=4), dict(segments=SEGMENTS, window=3), {}),
    "window across shards": (dict(sequence=8), dict(window=5), {}),
    "softcap": (dict(sequence=4), dict(segments=SEGMENTS), dict(softcap=0.7)),
    "both ways": (dict(sequence=4), dict(segments=SEGMENTS, causal=False), {}),
    "batch and tensor axes": (dict(fsdp=2, sequence=2, tensor=2), dict(segments=SEGMENTS, window=6), dict(softcap=2.0)),
    "data axis": (dict(data=2, sequence=4), dict(segments=SEGMENTS), {}),
    "tensor axis": (dict(sequence=2, tensor=4), dict(segments=SEGMENTS), {}),
    "one part": (dict(fsdp=2, tensor=2), dict(segments=SEGMENTS), {}),
}


@both
@pytest.mark.parametrize("case", CASES)
def test_the_reference_to_the_last_digits(x64, kernel, case):
    sizes, mask, options = CASES[case]
    check(kernel, mesh_layout(**sizes), draw(), make_mask(**mask), **options)


@both
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_queries_share_key_heads(x64, kernel, kv_heads):
    """With 1 and 2 there are fewer key-value heads than devices."""
    check(kernel, mesh_layout(sequence=4), draw(kv_heads=kv_heads), make_mask(SEGMENTS))


def test_key_heads_that_devices_divide_unevenly(x64):
    """Three heads for two devices: each is sent twice, and two of three halves are used."""
    check("ulysses", mesh_layout(sequence=2), draw(heads=12, kv_heads=3), make_mask(SEGMENTS))


@both
@pytest.mark.parametrize("window", [0, 5])
def test_rows_in_zigzag_order(x64, kernel, window):
    """Reordered rows with reordered places give the reordered result of the rows as they were."""
    order, back = zigzag_order(16, 4), zigzag_inverse(16, 4)
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
    check(kernel, mesh_layout(sequence=4), draw(dtype="bfloat16"), make_mask(SEGMENTS), atol=2e-2)


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


# --------------------------------------------------------------------------------------------- work


def test_the_ring_leaves_out_what_no_query_sees():
    """Keys of nan are seen by nobody: computed and masked they would still spoil sums."""
    query, key, value, d_out = draw(dtype="float32")
    value = value.at[:, 12:].set(np.nan)
    attend = on_mesh("ring", mesh_layout(sequence=4))
    found = numbers(
        lambda q, k, v, mask: attend(q, k, v, mask), (query, key, value, d_out.at[:, 12:].set(0)), make_mask()
    )
    assert np.isfinite(found["out"][:, :12]).all() and np.isnan(found["out"][:, 12:]).all()


def test_zigzag_order_by_hand():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag_order(8, 4).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    assert zigzag_order(6, 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert zigzag_order(8, 2)[zigzag_inverse(8, 2)].tolist() == list(range(8))
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


def test_ulysses_refuses_too_few_heads():
    with pytest.raises(ConfigError, match="2 query and 2 key-value heads.* must then be a multiple of 4. Take ring attention"):
        on_mesh("ulysses", mesh_layout(sequence=4, tensor=2))(*draw(heads=4, dtype="float32")[:3], make_mask())
