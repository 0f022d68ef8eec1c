"""Disentangled attention (DeBERTa, arXiv 2006.03654, section 3.1): contents have scores with positions, and back.

Letters: b batch, t queries, s keys, n heads, h head size, r relative positions.
"""

import math

import jax
import jax.numpy as jnp

from llm_jax.precision import wide_einsum
from llm_jax.sharding import Layout

TERMS = 3  # content to content is the third


def log_bucket(distance: jax.Array, buckets: int, max_distance: int) -> jax.Array:
    """The row of the table of relative positions for each distance (DeBERTa-v2's logarithmic buckets).

    Args:
      distance: int32, how far the key lies behind the query.
      buckets: rows of the table, half of them for keys ahead. Of each half the first half is exact, the rest
        logarithmic up to `max_distance`.

    Returns:
      int32 of the same shape in [0, buckets).
    """
    half, exact = buckets // 2, buckets // 4
    far = jnp.maximum(jnp.abs(distance), exact).astype(jnp.float32)
    steps = jnp.log(far / exact) / math.log((max_distance - 1) / exact) * (exact - 1)
    logarithmic = jnp.sign(distance) * (jnp.ceil(steps).astype(jnp.int32) + exact)
    bucket = jnp.where(jnp.abs(distance) <= exact, distance, logarithmic)
    return jnp.clip(bucket + half, 0, buckets - 1)


def disentangled_bias(
    query: jax.Array,
    key: jax.Array,
    position_query: jax.Array,
    position_key: jax.Array,
    bucket: jax.Array,
    layout: Layout,
) -> jax.Array:
    """(Q_t K^r_d + K_s Q^r_d) / sqrt(3 H), d the bucket of t - s: (B, N, T, S), at least float32.

    Args:
      query, key: (B, T, N, H) and (B, S, N, H), of contents.
      position_query, position_key: (R, N, H), of relative positions.
      bucket: (T, S) int32 in [0, R).
    """
    axes = ("batch", "heads", "length", None)
    to_position = layout(wide_einsum("btnh,rnh->bntr", query, position_key), *axes)
    from_position = layout(wide_einsum("bsnh,rnh->bnsr", key, position_query), *axes)
    bias = jnp.take_along_axis(to_position, bucket[None, None], axis=-1)
    bias += jnp.swapaxes(jnp.take_along_axis(from_position, bucket.T[None, None], axis=-1), 2, 3)
    return layout(bias / math.sqrt(TERMS * query.shape[-1]), *axes)
