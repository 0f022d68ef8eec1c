"""Normalisation with a backward pass that keeps the input alone, and GELU: both in the forms that are fast on CPUs."""

import functools
import math

import jax
import jax.numpy as jnp

from llm_jax.precision import at_least_float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def normalize(x: jax.Array, scale: jax.Array | None, eps: float, centred: bool) -> jax.Array:
    """LayerNorm (x - mean) / sqrt(variance + eps) (arXiv 1607.06450), or RMSNorm x / sqrt(mean(x^2) + eps)
    (arXiv 1910.07467) where not `centred`, over the last axis, times `scale`.

    Args:
      x: (..., D). Statistics are taken in at least float32.
      scale: (D,) or None.

    Returns:
      (..., D), in the dtype of `x`.
    """
    return _normalize(x, scale, eps, centred)[0]


def _normalize(x: jax.Array, scale: jax.Array | None, eps: float, centred: bool) -> tuple[jax.Array, tuple]:
    wide = at_least_float32(x)
    mean = wide.mean(-1, keepdims=True) if centred else jnp.zeros((), wide.dtype)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + eps)
    y = (wide - mean) * inverse
    if scale is not None:
        y = y * _row(scale, y)
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _normalize_backward(eps: float, centred: bool, kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, scale, mean, inverse = kept
    dy = at_least_float32(dy)
    normal = (at_least_float32(x) - mean) * inverse
    dscale = None
    if scale is not None:
        dscale = (dy * normal).sum(tuple(range(x.ndim - 1))).astype(scale.dtype)
        dy = dy * _row(scale, dy)
    dx = dy - normal * (dy * normal).mean(-1, keepdims=True)
    if centred:
        dx = dx - dy.mean(-1, keepdims=True)
    return (dx * inverse).astype(x.dtype), dscale


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


normalize.defvjp(_normalize, _normalize_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), Phi the normal distribution function: the exact form (arXiv 1606.08415).

    By erf; `jax.nn.gelu` goes by erfc, which is slower on CPUs.
    """
    wide = at_least_float32(x)  # 1 + erf cancels
    return (wide * _normal_below(wide)).astype(x.dtype)


def _normal_below(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    x, dy = jax.lax.optimization_barrier((x, dy))  # else XLA would keep the forward pass's erf, an array more
    wide = at_least_float32(x)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    return (((_normal_below(wide) + wide * density) * at_least_float32(dy)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


GATED = ("swiglu", "geglu", "geglu_erf", "clamped_swiglu")


def activate(kind: str, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """What stands between an MLP's products: act(gate) * up for the gated kinds (arXiv 2002.05202), else act(up)."""
    match kind:
        case "swiglu":
            return jax.nn.silu(gate) * up
        case "geglu":
            return jax.nn.gelu(gate) * up
        case "geglu_erf":
            return gelu(gate) * up
        case "clamped_swiglu":  # GPT-OSS (arXiv 2508.10925): SiLU by 1.702, both halves bounded, 1 added to the linear
            gate = jnp.minimum(gate, 7.0)
            return (jnp.clip(up, -7.0, 7.0) + 1) * gate * jax.nn.sigmoid(1.702 * gate)
        case "relu":
            return jax.nn.relu(up)
        case "gelu_tanh":
            return jax.nn.gelu(up)
        case "gelu":
            return gelu(up)
    raise ValueError(f"no activation is called {kind!r}")
