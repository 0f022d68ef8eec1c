"""Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1).

Every back end declares what it can do. `select` takes the fastest that covers the request on the platform in use, or
stops and names what is missing; nothing falls through to a back end that would ignore part of the request.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.errors import ConfigError
from llm_jax.kernels.context import all_to_all_attention, all_to_all_lacks, ring_attention
from llm_jax.kernels.dense import jax_attention, reference_attention
from llm_jax.kernels.masks import AttentionMask
from llm_jax.kernels.splash import LANES, splash_attention
from llm_jax.kernels.split import Split
from llm_jax.sharding import Layout

# ------------------------------------------------------------------------------------------------ the request


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks of attention; known from config and mesh, before there is any array."""

    segments: bool = False
    window: bool = False
    two_sided_window: bool = False  # it goes ahead too, where attention is not causal
    bias: bool = False  # an additive term on the scores, such as relative positions
    dropout: bool = False
    softcap: float = 0.0
    sinks: bool = False  # a learned score a head that holds no value
    cache: bool = False  # queries of a row stand at their own places, as in decoding
    dtype: str = "float32"
    head_dim: int = 64
    heads: int = 1
    kv_heads: int = 1
    length: int = 0  # tokens of a row; 0: not known
    length_parts: int = 1  # a row's tokens lie on so many devices
    head_parts: int = 1  # the heads lie on so many
    kv_head_parts: int = 1

    @property
    def split_length(self) -> bool:
        return self.length_parts > 1

    @property
    def gqa(self) -> bool:
        """Several query heads share a key-value head."""
        return self.kv_heads != self.heads

    def needs(self) -> frozenset[str]:
        return frozenset(name for name in CAPABILITIES if getattr(self, name))

    def whole_rows(self) -> "AttentionOptions":
        """What is asked of the attention within all-to-all: whole rows, on one device, of some of the heads."""
        return dataclasses.replace(self, length_parts=1, head_parts=1, kv_head_parts=1)


CAPABILITIES = (
    "segments", "window", "two_sided_window", "bias", "dropout", "softcap", "sinks", "split_length", "cache", "gqa",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ shapes

SAME_SPLIT = "key-value heads that are split as the heads are (mesh.activation_rules)"


def any_shape(options: AttentionOptions) -> list[str]:
    return []


def cudnn_lacks(options: AttentionOptions) -> list[str]:
    """As jax checks before it calls cuDNN (jax/_src/cudnn/fused_attention_stablehlo.py). Heads up to 256 would do on
    Hopper and later, but not before, and a config is read without looking at the card."""
    missing = []
    if options.head_dim > 128 or options.head_dim % 8:
        missing.append(f"heads of {options.head_dim} (multiples of 8 up to 128)")
    if options.segments and options.length % 2:  # they become a bias
        missing.append(f"packed rows of {options.length} tokens (an even number)")
    if options.head_parts != options.kv_head_parts:
        missing.append(SAME_SPLIT)
    return missing


def splash_lacks(options: AttentionOptions) -> list[str]:
    missing = [] if options.length % LANES == 0 else [f"rows of {options.length} tokens (multiples of {LANES})"]
    if options.head_parts != options.kv_head_parts:
        missing.append(SAME_SPLIT)
    return missing


def ring_lacks(options: AttentionOptions) -> list[str]:
    missing, chunks = [], 2 * options.length_parts  # of the zig-zag order
    if options.split_length and options.length % chunks:
        missing.append(f"rows of {options.length} tokens in {chunks} equal chunks, two a device")
    if options.head_parts != options.kv_head_parts:
        missing.append(SAME_SPLIT)
    return missing


def all_to_all_shape_lacks(options: AttentionOptions) -> list[str]:
    missing = []
    if options.length % options.length_parts:
        missing.append(f"rows of {options.length} tokens in {options.length_parts} equal parts")
    if options.head_parts != options.kv_head_parts:
        missing.append(SAME_SPLIT)
    elif heads := all_to_all_lacks(options.heads, options.kv_heads, options.length_parts, options.head_parts):
        missing.append(heads)
    return missing


# ------------------------------------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A back end: what it covers beyond plain attention, causal or not, and where it runs.

    Attributes:
      function: `function(query, key, value, mask, **terms)`, the terms being those of softcap, bias, dropout and sinks
        that it covers; where `by_device`, with a Split after the mask.
      covers: of CAPABILITIES.
      lacks_shape: what the shapes of a request lack, in words.
      by_device: it runs on each device by itself, under shard_map.
      for_split: "auto" takes it only where the length is split.
      zigzag: it gives all devices equal work if rows are in `context.zigzag_order`, and goes by the mask's places.
      within: it hands whole rows to another kernel, of the selector's choice.
      own_value_size: values may be of another size than keys; the others get the smaller ones filled up with zeros.
      names_output: remat knows its output by the name "attention", with what its backward pass reads beside it.
    """

    name: str
    function: Callable[..., jax.Array]
    covers: frozenset[str]
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float64")
    lacks_shape: Callable[[AttentionOptions], list[str]] = any_shape
    by_device: bool = False
    for_split: bool = False
    zigzag: bool = False
    within: bool = False
    own_value_size: bool = False
    names_output: bool = False

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: AttentionMask,
        *,
        layout: Layout | None = None,
        **terms: Any,
    ) -> jax.Array:
        """(B, T, N, H), (B, S, K, H), (B, S, K, V) to (B, T, N, V), as `dense.reference_attention` of the same.

        Args:
          layout: how the arrays are split over a mesh.
          terms: softcap, bias, dropout, sinks. Raises ValueError where one is not empty that this back end does not
            cover; `select` sees to it that there is none.
        """
        given = {name: term for name, term in terms.items() if term is not None and (name != "softcap" or term)}
        if more := given.keys() - self.covers:
            raise ValueError(f"{self.name} attention was given {', '.join(sorted(more))}, which it does not cover.")
        size = value.shape[-1]
        if not self.own_value_size:
            query, key, value = of_one_size(query, key, value)
        split = (Split.of(layout or Layout()),) if self.by_device else ()
        out = self.function(query, key, value, mask, *split, **given)
        return out if out.shape[-1] == size else out[..., :size]

    def lacks(self, options: AttentionOptions, platform: str) -> list[str]:
        """What stands between this back end and the request, in words."""
        missing = sorted(options.needs() - self.covers)
        if platform not in self.platforms:
            missing.append(f"the platform {platform}")
        if options.dtype not in self.dtypes:
            missing.append(f"the dtype {options.dtype}")
        return missing + self.lacks_shape(options)


def of_one_size(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same attention with heads of one size: zeros at the end of keys, queries or values change no product."""
    old, size = key.shape[-1], max(key.shape[-1], value.shape[-1])

    def fill(x: jax.Array) -> jax.Array:
        return x if x.shape[-1] == size else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1])))

    query = query if old == size else query * math.sqrt(size / old)  # kernels divide by the root of the size
    return fill(query), fill(key), fill(value)


KERNELS = (  # "auto" takes the first that covers the request
    Kernel(
        "cudnn",
        jax_attention("cudnn"),
        frozenset({"segments", "window", "gqa"}),
        platforms=("gpu",),
        dtypes=("bfloat16",),
        lacks_shape=cudnn_lacks,
    ),
    Kernel(
        "splash",
        splash_attention,
        frozenset({"segments", "window", "two_sided_window", "softcap", "sinks", "gqa"}),
        platforms=("tpu",),
        dtypes=("float32", "bfloat16"),
        lacks_shape=splash_lacks,
        names_output=True,
        by_device=True,
    ),
    Kernel(
        "ring",
        ring_attention,
        frozenset({"segments", "window", "two_sided_window", "softcap", "sinks", "split_length", "gqa"}),
        lacks_shape=ring_lacks,
        by_device=True,
        for_split=True,
        zigzag=True,
    ),
    Kernel(
        "all_to_all",
        all_to_all_attention,
        frozenset({"segments", "window", "two_sided_window", "softcap", "sinks", "split_length", "gqa"}),
        lacks_shape=all_to_all_shape_lacks,
        by_device=True,
        for_split=True,
        within=True,
    ),
    Kernel("reference", reference_attention, frozenset(CAPABILITIES), own_value_size=True),  # XLA gathers split rows
    Kernel(
        "xla",
        jax_attention("xla"),
        frozenset({"segments", "window", "two_sided_window", "bias", "split_length", "gqa"}),
        dtypes=("float32", "bfloat16"),  # its softmax is in float32 whatever the dtype
    ),
)


def select(name: str, options: AttentionOptions, platform: str) -> Kernel:
    """The kernel called `name`, or for "auto" the fastest one, that covers `options` on `platform`.

    A pure function of its arguments: it looks at no device.

    Raises:
      ConfigError: the named kernel cannot do what the model asks, with what it lacks.
    """
    fit = [kernel for kernel in KERNELS if not kernel.lacks(options, platform)]
    if name == "auto":
        kernel = next(kernel for kernel in fit if options.split_length or not kernel.for_split)
    else:
        kernel = next(kernel for kernel in KERNELS if kernel.name == name)
        if missing := kernel.lacks(options, platform):
            raise ConfigError(
                f"model.attention_kernel={name!r} cannot do what this model needs: it lacks {', '.join(missing)}. "
                f"Use {' or '.join(repr(other) for other in ['auto', *(other.name for other in fit)])}."
            )
    if kernel.within:
        inner = select("auto", options.whole_rows(), platform)
        within = functools.partial(kernel.function, inner=inner.attend)
        return dataclasses.replace(kernel, function=within, names_output=inner.names_output)
    return kernel


def why_not(name: str, options: AttentionOptions, platform: str) -> list[str]:
    """What the kernel called `name` lacks, in words."""
    return next(kernel for kernel in KERNELS if kernel.name == name).lacks(options, platform)


def home(name: str, platform: str) -> str:
    """The platform that a config with this back end is for: `platform` where it runs there, else its own."""
    kernel = next((kernel for kernel in KERNELS if kernel.name == name), None)
    return platform if kernel is None or platform in kernel.platforms else kernel.platforms[0]
