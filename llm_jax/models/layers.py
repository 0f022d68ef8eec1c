"""The leaf layers: Linear, Embedding, norms, dropout. Each parameter names its axes where it is declared."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.config import LoraConfig, TransformerConfig
from llm_jax.kernels.elementwise import normalize
from llm_jax.models.lora import has_adapter, merged
from llm_jax.models.quantize import quantized_product
from llm_jax.precision import Precision, at_least_float32
from llm_jax.rng import bits16
from llm_jax.sharding import Layout


class Axes(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """A parameter with the logical names of its axes, as Linen carries it through scan.

    Linen's own box applies sharding constraints from a global mesh; this one only keeps the names.
    """

    value: Any
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> "Axes":
        return self.replace(value=value)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Axes":
        return self.replace(names=(*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Axes":
        return self.replace(names=(*self.names[:index], *self.names[index + 1 :]))


def named(init: nn.initializers.Initializer, *names: str) -> Any:
    """`init`, with the logical names of the parameter's axes."""
    return lambda *args: Axes(init(*args), names)


def linear_init(cfg: TransformerConfig, *, residual: bool = False) -> nn.initializers.Initializer:
    """N(0, init_std), or uniform within 1/sqrt(fan_in) (torch.nn.Linear); both less for the residual stream."""
    scale = 1 / math.sqrt(2 * cfg.num_layers) if residual and cfg.residual_init_scale else 1.0
    if cfg.init == "torch":
        return nn.initializers.variance_scaling(scale**2 / 3, "fan_in", "uniform")
    return nn.initializers.normal(cfg.init_std * scale)


class Linear(nn.Module):
    """y = x W + b: (B, T, in) to (B, T, out). Either may be laid out in heads, in = (N, H) or out = (N, H).

    With adapters, where the model's config asks for them by this layer's name, y = x W + b + s (x A) B.
    """

    features: int
    axes: tuple[str, str]
    initializer: nn.initializers.Initializer
    layout: Layout
    precision: Precision
    use_bias: bool = False

    def __call__(self, x: jax.Array, *, over: int = 1, heads: int = 0) -> jax.Array:
        """x W + b, and what adapters add.

        Args:
          over: how many last axes of x are `in`: 2 where it is (N, H).
          heads: N of out = (N, H); 0: out is one axis.
        """
        taken = x.shape[x.ndim - over :]
        made = (heads, self.features // heads) if heads else (self.features,)
        kernel, bias, adapter = self._parameters(math.prod(taken), self._lora())
        kernel = kernel.astype(x.dtype).reshape(*taken, *made)
        y = product(x, kernel, self.layout, over=over, numbers=self.precision.products)
        if adapter is not None:
            a, b = (matrix.astype(x.dtype) for matrix in adapter)
            rows = ("batch", "length") if x.ndim - over == 2 else (None,) * (x.ndim - over)
            low = self.layout(product(x, a.reshape(*taken, -1), self.layout, over=over), *rows, "adapter")
            y = y + self._lora().scale * product(low, b.reshape(-1, *made), self.layout)
        return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (x.ndim - over) + made)

    def weights(self, size: int) -> tuple[jax.Array, jax.Array | None]:
        """W (size, features), and b (features,) or None: of a layer that is used otherwise, and has no adapter."""
        return self._parameters(size, None)[:2]

    def whole_kernel(self, size: int) -> jax.Array:
        """W + s A B (size, features): all that x is multiplied by."""
        kernel, _, adapter = self._parameters(size, self._lora())
        return kernel if adapter is None else merged(kernel, *adapter, self._lora().scale)

    def _lora(self) -> LoraConfig | None:
        """The adapter's settings: of the module that this layer belongs to."""
        lora = getattr(getattr(self.parent, "cfg", None), "lora", None)
        return lora if lora is not None and has_adapter(lora, self.name) else None

    @nn.compact
    def _parameters(
        self, size: int, lora: LoraConfig | None
    ) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array] | None]:
        """W (size, features), b (features,) or None, and A (size, rank) and B (rank, features) or None."""
        kept = self.precision.params
        kernel = self.param("kernel", named(self.initializer, *self.axes), (size, self.features), kept)
        bias, adapter = None, None
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, self.axes[1]), (self.features,), kept)
        if lora is not None:  # what trains is kept in at least float32: in bfloat16 small updates would be lost
            wide = jnp.promote_types(kept, jnp.float32)
            uniform = named(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), self.axes[0], "adapter")
            zeros = named(nn.initializers.zeros, "adapter", self.axes[1])
            adapter = (
                self.param("lora_a", uniform, (size, lora.rank), wide),
                self.param("lora_b", zeros, (lora.rank, self.features), wide),
            )
        return kernel, bias, adapter


def product(
    x: jax.Array, matrix: jax.Array, layout: Layout, *, over: int = 1, wide: bool = False, numbers: str = "native"
) -> jax.Array:
    """(B, T, in) times (in, out): (B, T, out) in the dtype of x, or with `wide` in at least float32, the dtype of the
    product's own sums: logits need it. `in` is `over` axes, `out` any number. `numbers` as `Precision.products`.

    Axes are put together where no mesh axis splits rows: XLA:CPU has a fast path for plain matrix products alone, in
    the backward pass too. Where one does, XLA would gather whole rows for it. On a TPU heads lie before tokens for
    attention: putting (N, H) together there would copy them.
    """
    rows, taken, made = x.shape[: x.ndim - over], matrix.shape[:over], matrix.shape[over:]
    whole_rows = layout.activation_pieces("length") == layout.activation_pieces("residual_length") == 1
    flat, plain = x.reshape(-1, math.prod(taken)), matrix.reshape(math.prod(taken), -1)
    dtype = jnp.promote_types(x.dtype, jnp.float32) if wide else x.dtype
    if numbers != "native":
        y = quantized_product(flat, plain, numbers)
    elif layout.runs_on == "tpu" or not whole_rows:
        # Behind the barrier XLA leaves the gradient's axes apart, as they come from attention, and copies nothing.
        matrix = jax.lax.optimization_barrier(matrix) if matrix.ndim > 2 else matrix
        y = jnp.tensordot(x, matrix, over, preferred_element_type=dtype)
    else:
        y = jnp.matmul(flat, plain, preferred_element_type=dtype)
    return y.reshape(*rows, *made)


class Norm(nn.Module):
    """RMSNorm, x / rms(x) (arXiv 1910.07467), or LayerNorm, (x - mean) / std (arXiv 1607.06450), over the last axis.

    Times w, which starts at one, or 1 + w, which starts at zero, or neither. Statistics are taken in at least float32;
    the result has the dtype of `x`.
    """

    kind: str
    eps: float
    precision: Precision
    scale: str = "one"  # one, zero, none: as `norm_scale`
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        match self.scale:
            case "one":
                scale = self._vector("scale", nn.initializers.ones, x)
            case "zero":
                scale = 1 + at_least_float32(self._vector("scale", nn.initializers.zeros, x))
            case "none":
                scale = None
        y = normalize(x, scale, self.eps, self.kind == "layernorm")
        if self.use_bias:
            bias = self._vector("bias", nn.initializers.zeros, x)
            y = y + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)
        return y

    def _vector(self, name: str, init: nn.initializers.Initializer, x: jax.Array) -> jax.Array:
        return self.param(name, named(init, "norm"), (x.shape[-1],), self.precision.params)


def block_norm(cfg: TransformerConfig, precision: Precision, name: str | None = None) -> Norm:
    """The norm of the residual stream."""
    use_bias = cfg.bias == "all" and cfg.norm == "layernorm"
    return Norm(cfg.norm, cfg.norm_eps, precision, cfg.norm_scale, use_bias, name=name)


class Embedding(nn.Module):
    """A table of `size` vectors; called with ids (B, T) it gives (B, T, D), with (...) it gives (..., D).

    The table is gathered over the mesh axes that shard its vectors before it is used: else the looked-up vectors would
    be split over the axes that also split the batch, and XLA would replicate them.
    """

    size: int
    features: int
    axes: tuple[str, str]
    initializer: nn.initializers.Initializer
    layout: Layout
    precision: Precision

    def setup(self) -> None:
        shape = (self.size, self.features)
        self.table = self.param("table", named(self.initializer, *self.axes), shape, self.precision.params)

    def __call__(self, ids: jax.Array) -> jax.Array:
        parts = self.layout.batch_shards * self.layout.activation_pieces("length")
        if parts == 1 or ids.ndim != 2:  # a table of buckets is small
            return jnp.take(self._gathered(), ids, axis=0)
        return look_up(self.table, ids, self.layout, self.axes, self.precision.compute.name)

    def first(self, count: int) -> jax.Array:
        """The vectors of ids 0 to count - 1, (count, D)."""
        return self._gathered()[:count]

    def head(self) -> jax.Array:
        """(D, size): the table as an output head."""
        return self._gathered().T

    def _gathered(self) -> jax.Array:
        return self.layout(self.table.astype(self.precision.compute), *self.axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def look_up(table: jax.Array, ids: jax.Array, layout: Layout, axes: tuple[str, str], dtype: str) -> jax.Array:
    """Vectors (B, T, D) of the ids (B, T) in a table (V, D) with logical `axes`, in `dtype`.

    Its gradient is summed over the devices in stages, as `Layout.summed` does: left to itself, XLA sends whole tables
    between slices.
    """
    return layout(jnp.take(layout(table.astype(dtype), *axes), ids, axis=0), "batch", "length", "embed")


def _look_up_forward(table: jax.Array, ids: jax.Array, layout: Layout, axes: tuple[str, str], dtype: str):
    return look_up(table, ids, layout, axes, dtype), (table, ids)


def _look_up_backward(layout: Layout, axes: tuple[str, str], dtype: str, saved, d_x: jax.Array):
    table, ids = saved
    rows, lengths = layout.batch_shards, layout.activation_pieces("length")

    def split(a: jax.Array) -> jax.Array:
        """(B, T, ...) to (S, P, B / S, T / P, ...), a part for each device."""
        a = a.reshape(rows, a.shape[0] // rows, lengths, a.shape[1] // lengths, *a.shape[2:])
        return layout(jnp.swapaxes(a, 1, 2), "batch", "length", *(None,) * (a.ndim - 2))

    def part(ids: jax.Array, d_x: jax.Array) -> jax.Array:
        return jnp.zeros(table.shape, d_x.dtype).at[ids].add(d_x)

    parts = layout(jax.vmap(jax.vmap(part))(split(ids), split(d_x)), "batch", "length", *axes)
    return layout.summed(parts, *axes).astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def dropout(
    x: jax.Array,
    rate: float,
    key: jax.Array | None,
    rows: jax.Array,
    layout: Layout,
    *axes: str | None,
    tokens: jax.Array | None = None,
    lines: jax.Array | None = None,
) -> jax.Array:
    """Zeroes entries with probability `rate`, rounded to 16 bits, and scales the others by 1 / (1 - the rounded rate).

    Each row's mask is a function of the key and of the row's number in the global batch, and with `tokens` each token's
    of its place in the row as well: so it is the same on every mesh, in every micro-batch, order and pipeline.

    Args:
      x: (B, ...), or with `tokens` (B, T, ...), of the logical axes `axes`.
      key: of this place in the model; None: no dropout.
      rows: (B,) int32.
      tokens: (T,) or (B, T) int32, the places of tokens that may stand in another order, or be some of a row.
      lines: int32 (x.shape[:-1]), where x has some lines of a larger array: each one's number in its row there. Not
        with `tokens`.
    """
    if key is None or not rate:
        return x
    kept = max(round((1 - rate) * 2**16), 1)  # of 2**16
    keep = draws(key, rows, tokens, lines, x.shape) <= kept - 1
    return jnp.where(layout(keep, *axes), x, 0) * (2**16 / kept)


@functools.partial(jax.jit, static_argnums=4)  # traced once a shape: a model has many such places
def draws(
    key: jax.Array, rows: jax.Array, tokens: jax.Array | None, lines: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
    """Uniform uint16 of `shape`, each row's, or each token's, of its own key; arguments as `dropout`."""
    each = jax.vmap(jax.random.fold_in, (None, 0))
    keys = each(key, rows)
    if tokens is None:
        return jax.vmap(lambda key, lines: bits16(key, shape[1:], lines))(keys, lines)
    keys = jax.vmap(each, (0, None if tokens.ndim == 1 else 0))(keys, tokens)
    return jax.vmap(jax.vmap(lambda key: bits16(key, shape[2:])))(keys)
