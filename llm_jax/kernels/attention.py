"""Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1).

Every back end declares what it can do. `select` takes the fastest that covers the request on the platform in use, or
stops and names what is missing; nothing falls through to a back end that would ignore part of the request.

Letters: b batch, q queries (of all heads that share a key head), s keys, k key-value heads, h head size.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.errors import ConfigError
from llm_jax.kernels.masks import AttentionMask


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of attention, known when the model is built."""

    segments: bool = False
    window: bool = False
    bias: bool = False  # an additive term on the scores, such as relative positions
    dropout: bool = False
    softcap: float = 0.0
    split_length: bool = False  # a row's tokens lie on several devices
    cache: bool = False  # queries of a row stand at their own places, as in decoding
    dtype: str = "float32"
    head_dim: int = 64

    def needs(self) -> frozenset[str]:
        names = ("segments", "window", "bias", "dropout", "softcap", "split_length", "cache")
        return frozenset(name for name in names if getattr(self, name))


def reference_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    softcap: float = 0.0,
    bias: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The formula as it stands, with the scores in at least float32: covers everything, keeps the (T, S) scores.

    Args:
      query: (B, T, N, H).
      key, value: (B, S, K, H), with N a multiple of K (grouped-query attention).
      mask: which keys each query sees. A query that sees none (padding) gets a finite value that nothing may use.
      softcap: c in c*tanh(scores/c), before the mask; 0 leaves them.
      bias: (1 or B, N, T, S), added to the scores.
      dropout: applied to the probabilities, (B, K, T, N / K, S).

    Returns:
      (B, T, N, H), in the dtype of `query`.
    """
    batch, length, heads, size = query.shape
    kv_heads, groups = key.shape[2], heads // key.shape[2]
    # The queries that share a key head are rows of one product; with g as an axis of its own it is slower on CPUs.
    query = (query * size**-0.5).reshape(batch, length, kv_heads, groups, size)
    query = jnp.moveaxis(query, 2, 1).reshape(batch, kv_heads, length * groups, size)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bkqh,bskh->bkqs", query, key, preferred_element_type=wide)
    scores = scores.reshape(batch, kv_heads, length, groups, -1)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        bias = bias.reshape(bias.shape[0], kv_heads, groups, *bias.shape[2:])
        scores = scores + jnp.swapaxes(bias, 2, 3)
    scores = jnp.where(mask.dense()[:, None, :, None], scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores)
    if dropout is not None:
        probabilities = dropout(probabilities)
    probabilities = probabilities.astype(value.dtype).reshape(batch, kv_heads, length * groups, -1)
    out = jnp.einsum("bkqs,bskh->bkqh", probabilities, value).reshape(batch, kv_heads, length, groups, size)
    return jnp.moveaxis(out, 1, 2).reshape(batch, length, heads, size)


def jax_attention(implementation: str) -> Callable[..., jax.Array]:
    """`jax.nn.dot_product_attention` with that implementation ("xla" or "cudnn")."""

    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: AttentionMask,
        *,
        softcap: float = 0.0,
        bias: jax.Array | None = None,
        dropout: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        assert not softcap and dropout is None, "the selector does not choose this back end for these"
        segments = mask.query_segments is not None
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=dataclasses.replace(mask, causal=False, window=0).dense()[:, None] if segments else None,
            is_causal=mask.causal,
            local_window_size=(mask.window - 1, 0) if mask.window else None,
            implementation=implementation,
        )

    return attend


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A back end: what it covers beyond plain causal attention, and where it runs."""

    name: str
    attend: Callable[..., jax.Array]
    covers: frozenset[str]
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float64")
    head_dim_limit: int = 0  # largest head size; 0: any

    def lacks(self, options: AttentionOptions, platform: str) -> list[str]:
        """What stands between this back end and the request, in words."""
        missing = sorted(options.needs() - self.covers)
        if platform not in self.platforms:
            missing.append(f"the platform {platform}")
        if options.dtype not in self.dtypes:
            missing.append(f"the dtype {options.dtype}")
        if self.head_dim_limit and (options.head_dim > self.head_dim_limit or options.head_dim % 8):
            missing.append(f"heads of {options.head_dim} (multiples of 8 up to {self.head_dim_limit})")
        return missing


KERNELS = (  # "auto" takes the first that covers the request
    Kernel(
        "cudnn",
        jax_attention("cudnn"),
        frozenset({"segments", "window"}),
        platforms=("gpu",),
        dtypes=("bfloat16",),
        head_dim_limit=128,
    ),
    Kernel(
        "reference",
        reference_attention,
        frozenset({"segments", "window", "bias", "dropout", "softcap", "split_length", "cache"}),
    ),
    Kernel("xla", jax_attention("xla"), frozenset({"segments", "window", "bias", "split_length"})),
)


def select(name: str, options: AttentionOptions, platform: str) -> Kernel:
    """The kernel called `name`, or for "auto" the fastest one, that covers `options` on `platform`.

    Raises:
      ConfigError: the named kernel cannot do what the model asks, with what it lacks.
    """
    if name == "auto":
        return next(kernel for kernel in KERNELS if not kernel.lacks(options, platform))
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    if missing := kernel.lacks(options, platform):
        fit = [other.name for other in KERNELS if not other.lacks(options, platform)]
        raise ConfigError(
            f"model.attention_kernel={name!r} cannot do what this model needs: it lacks {', '.join(missing)}. "
            f"Use {' or '.join(repr(other) for other in ['auto', *fit])}."
        )
    return kernel
