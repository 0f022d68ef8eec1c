"""Context parallelism: attention over rows whose tokens are split over a mesh axis, by a ring or by all-to-all.

`ring_attention` (Liu et al. 2023, arXiv 2310.01889): keys and values go round the devices, and each device keeps a
running softmax of its own queries. It has no limit on heads, and its memory is linear in the length.
`all_to_all_attention` (Ulysses; Jacobs et al. 2023, arXiv 2309.14509): an all-to-all gives each device whole rows of
some heads, another brings them back. It sends less, but needs heads enough.

The ring goes by the places in the mask, not by where a token stands in the array: rows may come in any order. With
`zigzag_order` every device has the same work under a causal mask. All-to-all does as the attention within it does.

Both work under `jax.vmap(..., spmd_axis_name=...)` too, the form of a pipeline's stages.

Letters: b batch, t queries, s keys, n heads, k key-value heads, r rows (a query of each head of one key head), h head
size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llm_jax.errors import ConfigError
from llm_jax.kernels.masks import AttentionMask
from llm_jax.kernels.split import Split
from llm_jax.precision import at_least_float32, wide_einsum

# ------------------------------------------------------------------------------------------------ order of tokens


def zigzag_order(length: int, parts: int) -> np.ndarray:
    """(length,) int64: which token of a row stands at each place, so that a causal mask gives all parts equal work.

    Of 2 * parts equal chunks, part i holds chunk i and chunk 2 * parts - 1 - i: an early one, whose queries see few
    keys, and a late one. `x[:, zigzag_order(...)]` orders rows so. Raises ConfigError if the chunks cannot be equal.
    """
    if length % (2 * parts):
        raise ConfigError(
            f"Rows of {length} tokens cannot be split into {2 * parts} equal chunks, two for each of {parts} devices "
            f"(mesh.sequence). Make data.sequence_length a multiple of {2 * parts}."
        )
    chunks = np.arange(length).reshape(2, parts, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


# ------------------------------------------------------------------------------------------------ all-to-all


def all_to_all_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    split: Split,
    *,
    inner: Callable[..., jax.Array],
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`inner` attention of whole rows, each device for its share of the heads (arXiv 2309.14509, section 3).

    Where key-value heads are too few, each is sent to all the devices whose queries need it.

    Args:
      query: (B, T, N, H), a global array under jit.
      key, value: (B, S, K, H), split likewise.
      mask: global, with the places of the tokens in an order that `inner` can take.
      split: the mesh, and over which of its axes B, T and N are split.
      inner: `inner(query, key, value, mask, **terms)`, with those of `softcap` and `sinks` that are not empty.
      softcap: c in c*tanh(scores/c); 0 leaves them.
      sinks: (N,) scores of keys without a value, or None.

    Returns:
      (B, T, N, H), split as `query`, in its dtype. Queries that see nothing get a finite value that nothing may use.

    Raises:
      ConfigError: tokens or heads do not split evenly.
    """
    split.check(query, key)
    kv_heads = key.shape[2] // split.head_parts
    shares = math.lcm(kv_heads, split.parts)
    if missing := all_to_all_lacks(query.shape[2], key.shape[2], split.parts, split.head_parts):
        raise ConfigError(f"All-to-all attention lacks {missing}. Take ring attention, or a smaller mesh.{split.axis}.")

    def whole_rows(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, split.axis, split_axis=2, concat_axis=1, tiled=True)

    def local(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, sinks: jax.Array | None
    ) -> jax.Array:
        terms = ({"softcap": softcap} if softcap else {}) | ({} if sinks is None else {"sinks": sinks})
        if split.parts == 1:
            return inner(query, key, value, mask, **terms)
        key, value = (jnp.repeat(x, shares // kv_heads, axis=2) for x in (key, value))
        out = inner(whole_rows(query), whole_rows(key), whole_rows(value), mask, **terms)
        return jax.lax.all_to_all(out, split.axis, split_axis=1, concat_axis=2, tiled=True)

    # The heads that a device of the head axes has are dealt to the devices of the length axis in order.
    head_axes = (*split.head_axes, split.axis) if split.axis else split.head_axes
    specs = (*[split.heads] * 3, split.mask(mask, None), None if sinks is None else PartitionSpec(head_axes))
    return split.run(local, specs, split.heads)(query, key, value, mask, sinks)


def all_to_all_lacks(heads: int, kv_heads: int, parts: int, head_parts: int) -> str:
    """What the heads lack to be split over `parts` devices, beside `head_parts` of the tensor axis; "": nothing."""
    heads, kv_heads = heads // head_parts, kv_heads // head_parts
    shares = math.lcm(kv_heads, parts)
    if parts == 1 or heads % shares == 0:
        return ""
    return f"query heads enough ({heads} on a tensor part, with {kv_heads} key-value heads: a multiple of {shares})"


# ------------------------------------------------------------------------------------------------ ring


@dataclasses.dataclass(frozen=True)
class Ring(Split):
    """All that is static about a ring attention."""

    softcap: float = 0.0
    tile: int = 512

    def pass_on(self, block: Any) -> Any:
        """Each device's block goes to the next device, and the one before sends its own."""
        if self.parts == 1:
            return block
        pairs = [(part, (part + 1) % self.parts) for part in range(self.parts)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), block)


def ring_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    split: Split,
    *,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    tile: int = 512,
) -> jax.Array:
    """Exact attention in memory linear in the length, forward and backward (arXiv 2310.01889, section 3).

    Each device works through its block of scores tile by tile and leaves out the tiles where no query sees a key, be
    it for order, window or segments. The gradient goes round the ring once more and computes the scores again from
    the saved logsumexp (Dao 2023, arXiv 2307.08691, algorithm 2). Scores and all sums are in at least float32.

    Args:
      query: (B, T, N, H), a global array under jit.
      key, value: (B, S, K, H), split likewise, with N a multiple of K.
      mask: global, with the places of the tokens in whatever order they stand.
      split: the mesh, and over which of its axes B, T and N are split.
      softcap: c in c*tanh(scores/c); 0 leaves them.
      sinks: (N,) scores of keys without a value, or None.
      tile: about how many queries, and keys, are worked on at once.

    Returns:
      (B, T, N, H), split as `query`, in its dtype; 0 for queries that see nothing.

    Raises:
      ConfigError: tokens or heads do not split evenly.
    """
    ring = Ring(**vars(split), softcap=softcap, tile=tile)
    ring.check(query, key)
    return _ring(query, key, value, mask, sinks, ring)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, sinks: jax.Array | None, ring: Ring
) -> jax.Array:
    return _forward(query, key, value, mask, sinks, ring)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, sinks: jax.Array | None, ring: Ring
) -> tuple[Any, Any]:
    specs = (*[ring.heads] * 3, ring.mask(mask, ring.axis), None if sinks is None else ring.sinks)
    run = ring.run(functools.partial(_ring_forward, ring=ring), specs, (ring.heads, ring.heads))
    out, logsumexp = run(query, key, value, mask, sinks)
    return out, (query, key, value, mask, sinks, out, logsumexp)


def _backward(ring: Ring, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    query, key, value, mask, sinks, out, logsumexp = saved
    delta = (at_least_float32(out) * at_least_float32(d_out)).sum(-1, keepdims=True)  # sum over keys of p * dp
    specs = (*[ring.heads] * 3, ring.mask(mask, ring.axis), *[ring.heads] * 3)
    run = ring.run(functools.partial(_ring_backward, ring=ring), specs, (ring.heads,) * 3)
    gradients = run(query, key, value, mask, d_out, logsumexp, delta)
    return *gradients, None, _sinks_gradient(sinks, logsumexp, delta)  # a mask has no gradient


def _sinks_gradient(sinks: jax.Array | None, logsumexp: jax.Array, delta: jax.Array) -> jax.Array | None:
    """p * (dp - delta) of the sinks' own probability p, where dp is 0: they hold no value. XLA adds up the devices'."""
    if sinks is None:
        return None
    p = jnp.exp(sinks.astype(logsumexp.dtype)[None, None, :, None] - logsumexp)
    return -(p * delta).sum((0, 1, 3)).astype(sinks.dtype)


_ring.defvjp(_forward, _backward)


# Within a device: places and numbers lie in tiles, the number of the tile first.


def _ring_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, sinks: jax.Array | None, *, ring: Ring
) -> tuple[jax.Array, jax.Array]:
    """On one device: its queries against every block of keys. Returns out (b, t, n, h) and logsumexp (b, t, n, 1)."""
    tile, key_tile = (_tile_length(x.shape[1], ring.tile) for x in (query, key))
    kv_heads = key.shape[2]
    query_places, key_places = _tiled_places(mask, tile, key_tile)
    queries = (query_places, _tiled(query, kv_heads, tile))
    block = (key_places, _tiled(key, kv_heads, key_tile), _tiled(value, kv_heads, key_tile))

    wide = at_least_float32(queries[1])
    peak = jnp.full_like(wide[..., :1], jnp.finfo(wide.dtype).min)
    weight = jnp.zeros_like(peak)
    if sinks is not None:  # keys that every query has already seen, of weight exp(sink - peak) = 1
        sinks = jnp.broadcast_to(sinks.astype(wide.dtype)[None, None, :, None], (*query.shape[:3], 1))
        peak, weight = _tiled(sinks, kv_heads, tile), jnp.ones_like(peak)
    state = (jnp.zeros_like(wide), weight, peak)

    def attend(state: Any, block: Any) -> Any:
        """The running softmax of all queries, with one more block of keys."""

        def one_query_tile(tile: Any) -> Any:
            queries, state = tile

            def one_key_tile(state: Any, keys: Any) -> tuple[Any, None]:
                return _where_seen(_forward_tile, mask, ring.softcap, state, queries, keys), None

            return jax.lax.scan(one_key_tile, state, block)[0]

        return jax.lax.map(one_query_tile, (queries, state))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        state, block = carry
        coming = ring.pass_on(block)  # travels while this device works on the block that it has
        return (attend(state, block), coming), None

    (state, block), _ = jax.lax.scan(step, (state, block), length=ring.parts - 1)
    total, weight, peak = attend(state, block)

    nothing = weight == 0
    weight = jnp.where(nothing, 1, weight)
    logsumexp = jnp.where(nothing, 0, peak + jnp.log(weight))
    return _untiled(total / weight, tile).astype(query.dtype), _untiled(logsumexp, tile)


def _ring_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    d_out: jax.Array,
    logsumexp: jax.Array,
    delta: jax.Array,
    *,
    ring: Ring,
) -> tuple[jax.Array, ...]:
    """On one device: gradients of its queries, keys and values. Those of a block of keys go round behind it."""
    tile, key_tile = (_tile_length(x.shape[1], ring.tile) for x in (query, key))
    kv_heads = key.shape[2]
    query_places, key_places = _tiled_places(mask, tile, key_tile)
    queries = (query_places, *(_tiled(x, kv_heads, tile) for x in (query, d_out, logsumexp, delta)))
    block = (key_places, _tiled(key, kv_heads, key_tile), _tiled(value, kv_heads, key_tile))

    def attend(d_query: jax.Array, block: Any) -> tuple[jax.Array, Any]:
        """The gradient of the queries, with one more block of keys; and the gradient of that block."""

        def one_query_tile(d_block: Any, tile: Any) -> tuple[Any, jax.Array]:
            queries, d_query = tile

            def one_key_tile(d_query: jax.Array, tile: Any) -> tuple[jax.Array, Any]:
                keys, d_keys = tile
                sums = (d_query, *d_keys)
                d_query, *d_keys = _where_seen(_backward_tile, mask, ring.softcap, sums, queries, keys)
                return d_query, tuple(d_keys)

            d_query, d_block = jax.lax.scan(one_key_tile, d_query, (block, d_block))
            return d_block, d_query

        zeros = tuple(jnp.zeros_like(at_least_float32(x)) for x in block[1:])
        d_block, d_query = jax.lax.scan(one_query_tile, zeros, (queries, d_query))
        return d_query, d_block

    def step(carry: Any, _: None) -> tuple[Any, None]:
        d_query, d_block, block = carry
        coming, d_arrived = ring.pass_on((block, d_block))  # both travel while this device works
        d_query, d_block = attend(d_query, block)
        return (d_query, jax.tree.map(jnp.add, d_arrived, d_block), coming), None

    coming = ring.pass_on(block)
    d_query, d_block = attend(jnp.zeros_like(at_least_float32(queries[1])), block)
    (d_query, d_block, _), _ = jax.lax.scan(step, (d_query, d_block, coming), length=ring.parts - 1)
    d_key, d_value = ring.pass_on(d_block)  # one step on from the last device is home
    gradients = (_untiled(d_query, tile), _untiled(d_key, key_tile), _untiled(d_value, key_tile))
    return tuple(d.astype(x.dtype) for d, x in zip(gradients, (query, key, value), strict=True))


def _where_seen(
    update: Callable[..., Any], mask: AttentionMask, softcap: float, sums: Any, queries: Any, keys: Any
) -> Any:
    """`update(sums, ...)` for a tile of queries and one of keys, or `sums` where none of them sees another."""
    (query_index, query_segments), (key_index, key_segments) = queries[0], keys[0]
    seen = dataclasses.replace(
        mask,
        query_index=query_index,
        key_index=key_index,
        query_segments=query_segments,
        key_segments=key_segments,
    ).dense()

    def run(sums: Any, seen: jax.Array, queries: Any, keys: Any) -> Any:
        groups = queries[1].shape[2] // seen.shape[1]
        return update(sums, queries[1:], keys[1:], jnp.repeat(seen, groups, axis=1)[:, None], softcap)

    # Under a vmap over masks (packed rows in a pipeline) the condition becomes a selection: all tiles are worked out.
    return jax.lax.cond(seen.any(), run, lambda sums, *_: sums, sums, seen, queries, keys)


def _forward_tile(sums: Any, queries: Any, keys: Any, seen: jax.Array, softcap: float) -> Any:
    """The running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867): sum of p v, sum of p, highest score."""
    (total, weight, peak), (query,), (key, value) = sums, queries, keys
    scores, _ = _scores(query, key, seen, softcap)
    new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
    p = jnp.where(seen, jnp.exp(scores - new_peak), 0)  # a row that sees nothing has all scores at its peak
    shrink = jnp.exp(peak - new_peak)
    total = total * shrink + wide_einsum("bkrs,bksh->bkrh", p.astype(value.dtype), value)
    return total, weight * shrink + p.sum(-1, keepdims=True), new_peak


def _backward_tile(sums: Any, queries: Any, keys: Any, seen: jax.Array, softcap: float) -> Any:
    """What a tile adds to the gradients of its queries, keys and values (arXiv 2307.08691, algorithm 2)."""
    (d_query, d_key, d_value), (query, d_out, logsumexp, delta), (key, value) = sums, queries, keys
    scores, slope = _scores(query, key, seen, softcap)
    p = jnp.exp(scores - logsumexp)
    d_value += wide_einsum("bkrs,bkrh->bksh", p.astype(d_out.dtype), d_out)
    d_scores = p * (wide_einsum("bkrh,bksh->bkrs", d_out, value) - delta) * slope
    d_scores = d_scores.astype(query.dtype)
    d_query += wide_einsum("bkrs,bksh->bkrh", d_scores, key)
    d_key += wide_einsum("bkrs,bkrh->bksh", d_scores, query)
    return d_query, d_key, d_value


def _scores(query: jax.Array, key: jax.Array, seen: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | float]:
    """(b, k, r, s) scores, the lowest number where not `seen`; and their slope by the product of query and key."""
    slope = query.shape[-1] ** -0.5
    scores = wide_einsum("bkrh,bksh->bkrs", query, key) * slope
    if softcap:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, slope * (1 - capped * capped)
    return jnp.where(seen, scores, jnp.finfo(scores.dtype).min), slope


def _tile_length(length: int, target: int) -> int:
    """The divisor nearest to `target` of half the length: a tile lies in one of the two chunks of a zig-zag order."""
    half = length // 2 if length % 2 == 0 else length
    divisors = [size for size in range(1, half + 1) if half % size == 0]
    return min(divisors, key=lambda size: abs(math.log(size / target)))


def _tiled(x: jax.Array, kv_heads: int, tile: int) -> jax.Array:
    """(b, t, n, h) to (t / tile, b, k, r, h), with the heads that share a key head as rows of one product."""
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length // tile, tile, kv_heads, heads // kv_heads, size)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(length // tile, batch, kv_heads, -1, size)


def _untiled(x: jax.Array, tile: int) -> jax.Array:
    """The inverse of `_tiled`."""
    tiles, batch, kv_heads, rows, size = x.shape
    x = x.reshape(tiles, batch, kv_heads, tile, rows // tile, size)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(batch, tiles * tile, -1, size)


def _tiled_places(mask: AttentionMask, tile: int, key_tile: int) -> tuple[Any, Any]:
    """(index, segments) of the queries, and of the keys, in tiles."""

    def tiled(x: jax.Array | None, tile: int) -> jax.Array | None:
        return None if x is None else jnp.moveaxis(x.reshape(*x.shape[:-1], -1, tile), -2, 0)

    query_index = mask.query_index if mask.query_index.ndim == 2 else mask.query_index[None]
    queries = (tiled(query_index, tile), tiled(mask.query_segments, tile))
    return queries, (tiled(mask.key_index, key_tile), tiled(mask.key_segments, key_tile))
