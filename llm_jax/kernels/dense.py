"""Attention that makes the whole matrix of scores: the formula as it stands, and JAX's own function.

Letters: b batch, q queries (of all heads that share a key head), s keys, k key-value heads, h head size.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.kernels.masks import AttentionMask


def reference_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    softcap: float = 0.0,
    bias: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """The formula as it stands, with the scores in at least float32: covers everything, keeps the (T, S) scores.

    Args:
      query: (B, T, N, H).
      key, value: (B, S, K, H) and (B, S, K, V), with N a multiple of K (grouped-query attention).
      mask: which keys each query sees. A query that sees none (padding) gets a finite value that nothing may use.
      softcap: c in c*tanh(scores/c), before the mask; 0 leaves them.
      bias: (1 or B, N, T, S), added to the scores.
      dropout: of the probabilities, (B, K, T, N / K, S): it zeroes some and scales the rest.
      sinks: (N,), each head's score of a key that all queries see and that holds no value (gpt-oss, arXiv
        2508.10925): probabilities add up to less than 1. It is not scaled, capped or dropped.

    Returns:
      (B, T, N, V), in the dtype of `value`.
    """
    batch, length, heads, size = query.shape
    kv_heads, groups = key.shape[2], heads // key.shape[2]
    # The queries that share a key head are rows of one product; with g as an axis of its own it is slower on CPUs.
    query = (query * size**-0.5).reshape(batch, length, kv_heads, groups, size)
    query = jnp.moveaxis(query, 2, 1).reshape(batch, kv_heads, length * groups, size)
    key, value = jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)
    if length > 1:  # one copy of each for all products, forward and backward: left alone, XLA:CPU makes more of them
        key, value = jax.lax.optimization_barrier((key, value))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bkqh,bksh->bkqs", query, key, preferred_element_type=wide)
    scores = scores.reshape(batch, kv_heads, length, groups, -1)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        bias = bias.reshape(bias.shape[0], kv_heads, groups, *bias.shape[2:])
        scores = scores + jnp.swapaxes(bias, 2, 3)
    scores = jnp.where(mask.dense()[:, None, :, None], scores, jnp.finfo(scores.dtype).min)
    sinks = None if sinks is None else sinks.astype(wide).reshape(1, kv_heads, 1, groups, 1)
    weights, total = softmax_parts(scores, sinks)
    if dropout is not None:
        weights = dropout(weights)
    weights = weights.astype(value.dtype).reshape(batch, kv_heads, length * groups, -1)
    # Wide until it is divided: what is rounded here would stand in the gradients of all of a query's scores.
    out = jnp.einsum("bkqs,bksh->bkqh", weights, value, preferred_element_type=wide)
    out = out.reshape(batch, kv_heads, length, groups, -1) / total
    return jnp.moveaxis(out, 1, 2).reshape(batch, length, heads, -1).astype(value.dtype)


def softmax_parts(scores: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Numerators (..., S) and denominator (..., 1) of a softmax over the last axis; `sinks` (..., 1) count in that.

    Whoever multiplies the numerators with values divides behind that: fewer numbers, and no sum over keys backward.
    """
    peak = scores.max(-1, keepdims=True)
    peak = jax.lax.stop_gradient(peak if sinks is None else jnp.maximum(peak, sinks))
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    return weights, total if sinks is None else total + jnp.exp(sinks - peak)


def jax_attention(implementation: str) -> Callable[..., jax.Array]:
    """`jax.nn.dot_product_attention` with that implementation ("xla" or "cudnn").

    cuDNN is given segments as a bias (B, 1, T, S), as jax does with any mask: right, and quadratic in memory. Sinks
    could be had from the logsumexp that it returns on request, but jax stops that one's gradient and rounds it.
    """

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *, bias: jax.Array | None = None
    ) -> jax.Array:
        mask.check_in_order()
        segments = mask.query_segments is not None
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=dataclasses.replace(mask, causal=False, window=0).dense()[:, None] if segments else None,
            is_causal=mask.causal,
            local_window_size=mask.reach(),
            implementation=implementation,
        )

    return attend
