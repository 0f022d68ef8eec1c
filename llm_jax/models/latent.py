"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads are made of few numbers a token, c = norm(W_DKV x), which are all that decoding keeps of
it, beside one key for all heads that holds the position:

    k_i = [W_UK,i c, R(W_KR x)]     v_i = W_UV,i c     q_i = [W_UQ,i c', R(W_QR,i c')]     c' = norm(W_DQ x), or x

with R the rotation of rotary positions.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.config import TransformerConfig
from llm_jax.config.kinds import LayerKind
from llm_jax.kernels.dense import reference_attention
from llm_jax.models.attention import (
    Shared,
    attend_with,
    cached,
    drop_probabilities,
    head_dim,
    output_projection,
    query_dim,
    value_dim,
)
from llm_jax.models.layers import Linear, Norm, linear_init
from llm_jax.models.positions import rotate
from llm_jax.precision import Precision
from llm_jax.sharding import Layout


class LatentAttention(nn.Module):
    """As `attention.Attention`, over x (B, T, D)."""

    cfg: TransformerConfig
    layout: Layout
    precision: Precision
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(
        self, x: jax.Array, dropout_key: jax.Array | None, shared: Shared, *, cache_length: int = 0
    ) -> jax.Array:
        """(B, T, D) to (B, T, D); arguments as `Attention`. The cache holds c and the rotated key, S slots of each."""
        cfg, rank = self.cfg, self.cfg.latent.kv_rank
        shared = shared.seen_by(self.kind, cfg.sliding_window)
        drop = drop_probabilities(cfg, self.layout, dropout_key, shared.rows, "heads")
        query, query_rope = jnp.split(self._query(x), [head_dim(cfg)], axis=-1)
        latent = self._norm("latent_norm")(self._linear("latent_down", rank, ("embed", "rank"))(x))
        key_rope = self._linear("key_rope", cfg.latent.rope_dim, ("embed", "rank"))(x)[:, :, None]  # (B, T, 1, R)
        if shared.angles is not None:
            query_rope, key_rope = rotate(query_rope, shared.angles), rotate(key_rope, shared.angles)
        scale = cfg.attention_scale or query_dim(cfg) ** -0.5
        attend = functools.partial(self._attend, shared=shared, drop=drop, own_places=bool(cache_length))

        key_up = self._linear("key_up", cfg.num_heads * head_dim(cfg), ("latent", "heads"))
        value_up = self._linear("value_up", cfg.num_heads * value_dim(cfg), ("latent", "heads"))
        if cache_length:
            new = {"cached_latent": latent, "cached_key_rope": key_rope}
            latent, key_rope = cached(self, new, shared.mask.query_index, cache_length)
        if cache_length and self.precision.products == "native":
            # q^T (W_UK c) = (W_UK^T q)^T c and sum p (W_UV c) = W_UV (sum p c): no key or value is ever made.
            query = jnp.einsum("btnh,cnh->btnc", query, self._matrix(key_up, query))
            one_head = latent[:, :, None]
            out = attend((query, query_rope), (one_head, key_rope), one_head, scale=scale)
            out = jnp.einsum("btnc,cnh->btnh", out, self._matrix(value_up, query))
        else:
            key, value = self._heads(key_up(latent)), self._heads(value_up(latent))
            key_rope = jnp.broadcast_to(key_rope, (*key.shape[:-1], key_rope.shape[-1]))
            out = attend((query, query_rope), (key, key_rope), value, scale=scale)
        out = self.layout(out, "batch", "length", "heads", "head_dim")
        return output_projection(cfg, self.layout, self.precision)(out)

    def _query(self, x: jax.Array) -> jax.Array:
        """(B, T, N, H), H with the part that will rotate at its end."""
        cfg, size = self.cfg, self.cfg.num_heads * query_dim(self.cfg)
        if not cfg.latent.query_rank:
            return self._heads(self._linear("query", size, ("embed", "heads"))(x))
        down = self._linear("query_down", cfg.latent.query_rank, ("embed", "rank"))(x)
        return self._heads(self._linear("query_up", size, ("latent", "heads"))(self._norm("query_norm")(down)))

    def _attend(
        self,
        query: tuple[jax.Array, jax.Array],
        key: tuple[jax.Array, jax.Array],
        value: jax.Array,
        *,
        scale: float,
        shared: Shared,
        drop: functools.partial | None,
        own_places: bool,
    ) -> jax.Array:
        """Softmax attention of queries and keys in two parts, (B, T, N, _) and (B, S, N or 1, _)."""
        queries, keys = jnp.concatenate(query, -1), jnp.concatenate(key, -1)
        queries = queries * (scale * math.sqrt(queries.shape[-1]))  # kernels divide by it
        names = ("query", "key", "value")
        queries, keys, value = map(checkpoint_name, (queries, keys, value), names)
        attend = reference_attention
        if not self.is_initializing():
            attend = attend_with(
                self.cfg, self.layout, self.kind, queries, shared.mask, drop=drop, own_places=own_places
            )
        return attend(queries, keys, value, shared.mask, softcap=self.cfg.attention_softcap, dropout=drop)

    def _linear(self, name: str, features: int, axes: tuple[str, str]) -> Linear:
        return Linear(features, axes, linear_init(self.cfg), self.layout, self.precision, name=name)

    def _norm(self, name: str) -> Norm:
        return Norm("rmsnorm", self.cfg.norm_eps, self.precision, self.cfg.norm_scale, name=name)

    def _heads(self, x: jax.Array) -> jax.Array:
        """(B, T, N H) to (B, T, N, H)."""
        x = x.reshape(*x.shape[:-1], self.cfg.num_heads, -1)
        return self.layout(x, "batch", "length", "heads", "head_dim")

    def _matrix(self, up: Linear, like: jax.Array) -> jax.Array:
        """(C, N, H): what `up` multiplies by."""
        kernel = up.whole_kernel(self.cfg.latent.kv_rank)
        return kernel.astype(like.dtype).reshape(len(kernel), self.cfg.num_heads, -1)
