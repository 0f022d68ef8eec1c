"""Multi-head attention: project, attend, project back, with an optional cache for decoding."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.config import RopeConfig, TransformerConfig
from llm_jax.config.kinds import LayerKind
from llm_jax.kernels.attention import AttentionOptions, Kernel, select
from llm_jax.kernels.dense import reference_attention
from llm_jax.kernels.masks import AttentionMask, at
from llm_jax.models.disentangled import TERMS, disentangled_bias
from llm_jax.models.layers import Linear, Norm, dropout, linear_init, named
from llm_jax.models.positions import rotary_angles, rotate
from llm_jax.precision import Precision
from llm_jax.sharding import Layout


def head_dim(cfg: TransformerConfig) -> int:
    return cfg.head_dim or cfg.embed_dim // cfg.num_heads


def query_dim(cfg: TransformerConfig) -> int:
    """Numbers of a query's head, and of a key's."""
    return head_dim(cfg) + (cfg.latent.rope_dim if cfg.latent.kv_rank else 0)


def value_dim(cfg: TransformerConfig) -> int:
    return cfg.latent.value_dim or head_dim(cfg)


def rotary_dim(cfg: TransformerConfig) -> int:
    """How many numbers of a head may rotate."""
    return cfg.latent.rope_dim if cfg.latent.kv_rank else head_dim(cfg)


def num_kv_heads(cfg: TransformerConfig) -> int:
    return cfg.num_kv_heads or cfg.num_heads


def choose_kernel(
    cfg: TransformerConfig,
    layout: Layout,
    kind: LayerKind,
    *,
    segments: bool,
    length: int,
    dtype: str,
    dropout: bool,
    cache: bool = False,
) -> Kernel:
    """The attention back end of a layer: of `cfg.attention_kernel`, or the fastest that can do what is asked.

    It looks at no device, so it also tells when a config is read (with `sharding.abstract_layout`).

    Args:
      segments: rows are packed.
      length: tokens of a row; 0: not known.
      dtype: of queries, keys and values: `precision.compute`.
      dropout: of probabilities: in training, where cfg.dropout.attention is not 0.
      cache: queries stand at places of their own, in decoding or where the last block computes some tokens alone: the
        fastest is taken then whatever `cfg.attention_kernel` says.

    Raises:
      ConfigError: the back end of that name cannot do it, with all that it lacks.
    """
    given = dict(segments=segments, length=length, dtype=dtype, dropout=dropout, cache=cache)
    request = attention_request(cfg, layout, kind, **given)
    return select("auto" if cache else cfg.attention_kernel, request, layout.runs_on)


def attention_request(
    cfg: TransformerConfig,
    layout: Layout,
    kind: LayerKind,
    *,
    segments: bool,
    length: int,
    dtype: str,
    dropout: bool,
    cache: bool = False,
) -> AttentionOptions:
    """What a layer asks of its attention; arguments as `choose_kernel`."""
    return AttentionOptions(
        segments=segments,
        window=kind.window,
        two_sided_window=kind.window and cfg.family == "encoder",
        bias=cfg.positions in ("relative", "disentangled"),
        dropout=dropout,
        softcap=cfg.attention_softcap,
        sinks=cfg.attention_sinks,
        cache=cache,
        dtype=dtype,
        head_dim=max(query_dim(cfg), value_dim(cfg)),
        heads=cfg.num_heads,
        kv_heads=num_kv_heads(cfg),
        length=length,
        length_parts=layout.activation_pieces("length"),
        head_parts=layout.activation_pieces("heads"),
        kv_head_parts=layout.activation_pieces("heads" if cfg.latent.kv_rank else "kv_heads"),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """What every block reads beside the residual stream, made once a step.

    Attributes:
      mask: which keys each query sees, windows left out; when decoding, keys are the slots of the cache.
      rows: (B,) int32, each row's number in the global batch.
      angles: rotary cosine and sine, (B, T, 1, R / 2) each, or None.
      window_angles: those of windowed layers, where they differ; else None.
      bias: (1 or B, N, T, S) added to the scores, or None.
      relative: vectors of relative positions (R, D), and the one that each pair of tokens has (T, S); or None.
    """

    mask: AttentionMask
    rows: jax.Array
    angles: tuple[jax.Array, jax.Array] | None = None
    window_angles: tuple[jax.Array, jax.Array] | None = None
    bias: jax.Array | None = None
    relative: tuple[jax.Array, jax.Array] | None = None

    @classmethod
    def of(
        cls, cfg: TransformerConfig, mask: AttentionMask, rows: jax.Array, positions: jax.Array, **more: Any
    ) -> "Shared":
        """With the rotary angles of tokens at `positions` (B, T) in their documents, where the model has such."""
        if cfg.positions != "rotary":
            return cls(mask, rows, **more)
        angles, window_angles = rotary_angles(cfg.rope, rotary_dim(cfg), positions), None
        if cfg.window_rope_base:
            window_rope = RopeConfig(base=cfg.window_rope_base, fraction=cfg.rope.fraction)
            window_angles = rotary_angles(window_rope, rotary_dim(cfg), positions)
        return cls(mask, rows, angles, window_angles, **more)

    def seen_by(self, kind: LayerKind, window: int) -> "Shared":
        """What a layer of this kind reads: its own mask and angles, or none."""
        if not kind.positions:
            return dataclasses.replace(self, angles=None)
        if not kind.window:
            return self
        mask = dataclasses.replace(self.mask, window=window)
        return dataclasses.replace(self, mask=mask, angles=self.window_angles or self.angles)


class Attention(nn.Module):
    """MultiHead(x) = Concat(head_1, ..., head_N) W_O (arXiv 1706.03762, section 3.2.2), over x (B, T, D)."""

    cfg: TransformerConfig
    layout: Layout
    precision: Precision
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        dropout_key: jax.Array | None,
        shared: Shared,
        *,
        cache_length: int = 0,
        read: jax.Array | None = None,
    ) -> jax.Array:
        """(B, T, D) to (B, T, D).

        Args:
          dropout_key: of probabilities; None: no dropout.
          cache_length: slots of the cache; 0: attend within x.
          read: (B, P) int32, the places of the only queries; the result is (B, P, D) then.
        """
        cfg = self.cfg
        heads, kv_heads, size = cfg.num_heads, num_kv_heads(cfg), head_dim(cfg)
        shared = shared.seen_by(self.kind, cfg.sliding_window)
        mask, angles = shared.mask, shared.angles
        drop = drop_probabilities(cfg, self.layout, dropout_key, shared.rows, "kv_heads", read)
        to_query = self._heads("query", heads, "heads")
        to_key = self._heads("key", kv_heads, "kv_heads")
        of_query = (lambda x: x) if read is None else lambda x: at(x, read)
        query, key, value = to_query(of_query(x)), to_key(x), self._heads("value", kv_heads, "kv_heads")(x)
        query, key = self._normed("query_norm", query), self._normed("key_norm", key)
        if angles is not None:
            query, key = rotate(query, jax.tree.map(of_query, angles)), rotate(key, angles)
        if cfg.attention_scale:  # kernels divide by sqrt(size)
            query = query * (cfg.attention_scale * math.sqrt(size))
        bias = shared.bias
        if read is not None:
            mask = mask.of_queries(read)
            bias = None if bias is None else jnp.swapaxes(at(jnp.swapaxes(bias, 1, 2), read), 1, 2)
        if shared.relative is not None:
            vectors, bucket = shared.relative
            positions = (to_query(vectors), to_key(vectors))
            bias = disentangled_bias(query, key, *positions, bucket, self.layout)
            query = query * TERMS**-0.5
        query, key, value = map(checkpoint_name, (query, key, value), ("query", "key", "value"))
        if cache_length:
            new = {"cached_key": key, "cached_value": value}
            key, value = cached(self, new, mask.query_index, cache_length)

        sinks = None
        if cfg.attention_sinks:
            sinks = self.param("sinks", named(nn.initializers.zeros, "heads"), (heads,), self.precision.params)
        attend = reference_attention
        if not self.is_initializing():  # that is on one row of one token, which no mesh splits
            own_places = bool(cache_length) or read is not None
            attend = attend_with(cfg, self.layout, self.kind, query, mask, drop=drop, own_places=own_places)
        out = attend(query, key, value, mask, softcap=cfg.attention_softcap, bias=bias, dropout=drop, sinks=sinks)

        out = self.layout(out, "batch", "length", "heads", "head_dim")
        return output_projection(cfg, self.layout, self.precision)(out)

    def _heads(self, name: str, heads: int, axis: str) -> Callable[[jax.Array], jax.Array]:
        """The projection of (B, T, D) to (B, T, heads, H), and of (R, D) to (R, heads, H)."""
        size = head_dim(self.cfg)
        project = Linear(
            heads * size,
            ("embed", axis),
            linear_init(self.cfg),
            self.layout,
            self.precision,
            use_bias=self.cfg.bias in ("all", "attention", "qkv"),
            name=name,
        )

        def split(x: jax.Array) -> jax.Array:
            rows = ("batch", "length") if x.ndim == 3 else (None,)
            return self.layout(project(x, heads=heads), *rows, axis, "head_dim")

        return split

    def _normed(self, name: str, x: jax.Array) -> jax.Array:
        """The queries or keys (B, T, heads, H), normalised as `qk_norm` says."""
        cfg = self.cfg
        norm = Norm("rmsnorm", cfg.norm_eps, self.precision, cfg.norm_scale, name=name)
        match cfg.qk_norm:
            case "head":
                return norm(x)
            case "all":
                return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)
        return x


# --------------------------------------------------------------------------- what latent attention does likewise


def attend_with(
    cfg: TransformerConfig,
    layout: Layout,
    kind: LayerKind,
    query: jax.Array,
    mask: AttentionMask,
    *,
    drop: functools.partial | None,
    own_places: bool,
) -> Callable[..., jax.Array]:
    """`attend(query, key, value, mask, **terms)` of the layer's back end, on its mesh; remat knows what it returns.

    `own_places`: the queries stand where the mask says and not in order: in decoding, or some of a row alone.
    """
    kernel = choose_kernel(
        cfg,
        layout,
        kind,
        segments=mask.query_segments is not None,
        length=query.shape[1],
        dtype=query.dtype.name,
        dropout=drop is not None,
        cache=own_places,
    )

    def attend(*arrays: Any, **terms: Any) -> jax.Array:
        out = kernel.attend(*arrays, layout=layout, **terms)
        return out if kernel.names_output else checkpoint_name(out, "attention")

    return attend


def drop_probabilities(
    cfg: TransformerConfig,
    layout: Layout,
    key: jax.Array | None,
    rows: jax.Array,
    heads: str,
    read: jax.Array | None = None,
) -> functools.partial | None:
    """Dropout of probabilities (B, K, T, N / K, S), K the logical axis `heads`; None: there is none. With `read` (B, P)
    of the queries there, (B, K, P, N / K, T), as they have it among all."""
    rate = cfg.dropout.attention
    if key is None or not rate:
        return None
    axes = ("batch", heads, "length", None, None)
    return functools.partial(_drop, rate=rate, key=key, rows=rows, layout=layout, axes=axes, read=read)


def _drop(
    x: jax.Array, *, rate: float, key: jax.Array, rows: jax.Array, layout: Layout, axes: tuple, read: jax.Array | None
) -> jax.Array:
    if read is None:
        return dropout(x, rate, key, rows, layout, *axes)
    _, kv_heads, _, groups, length = x.shape
    head, group = jnp.arange(kv_heads)[None, :, None, None], jnp.arange(groups)[None, None, None]
    lines = (head * length + read[:, None, :, None]) * groups + group
    return dropout(x, rate, key, rows, layout, *axes, lines=lines)


def cached(module: nn.Module, new: dict[str, jax.Array], slots: jax.Array, cache_length: int) -> list[jax.Array]:
    """Write arrays (B, T, ...) into their slots (B, T) of the module's caches, and return all slots (B, S, ...).

    A token's slot is its place in the row; a slot beyond the cache (padding) is not written.
    """
    caches = []
    for name, values in new.items():
        batch = values.shape[0]
        shape = (batch, cache_length, *values.shape[2:])
        cache = module.variable("cache", name, jnp.zeros, shape, values.dtype)
        cache.value = cache.value.at[jnp.arange(batch)[:, None], slots].set(values, mode="drop")
        caches.append(cache.value)
    return caches


def output_projection(cfg: TransformerConfig, layout: Layout, precision: Precision) -> Callable[[jax.Array], jax.Array]:
    """W_O over (B, T, N, H), with the scale of its output."""
    out = Linear(
        cfg.embed_dim,
        ("heads", "embed"),
        linear_init(cfg, residual=True),
        layout,
        precision,
        use_bias=cfg.bias in ("all", "attention"),
        name="out",
    )
    return lambda x: checkpoint_name(out(x, over=2) * cfg.attention_output_scale, "attention_output")
