"""Where a token stands: sinusoids, rotary angles with their scalings, relative-position buckets."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import RopeConfig
from llm_jax.precision import at_least_float32


def sinusoid(positions: jax.Array, dim: int) -> jax.Array:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d)) (arXiv 1706.03762, section 3.5).

    Args:
      positions: (...) int32.
      dim: d, even.

    Returns:
      (..., d) float32.
    """
    rates = jnp.asarray(10_000.0 ** (-np.arange(0, dim, 2) / dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * rates.reshape((1,) * positions.ndim + (-1,))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, dim)


def rotary_frequencies(cfg: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per token of each rotating pair, and the factor that scales sine and cosine.

    Returns:
      (R / 2,) float64 with R the even number of rotating entries of a head; and a float (1 but for yarn).
    """
    rotating = int(head_dim * cfg.fraction) // 2 * 2
    frequencies = cfg.base ** (-np.arange(0, rotating, 2) / rotating)
    if cfg.scaling == "linear":  # arXiv 2306.15595
        return frequencies / cfg.factor, 1.0
    if cfg.scaling == "llama3":
        return llama3_frequencies(cfg, frequencies), 1.0
    if cfg.scaling == "yarn":
        return yarn_frequencies(cfg, frequencies, rotating), cfg.attention_factor or 0.1 * math.log(cfg.factor) + 1.0
    return frequencies, 1.0


def llama3_frequencies(cfg: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths slowed by `factor`, short ones kept, a linear blend between (LLaMA 3.1's published scaling)."""
    turns = cfg.original_length * frequencies / (2 * math.pi)  # in the context the model was trained on
    blend = (turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / cfg.factor + blend * frequencies


def yarn_frequencies(cfg: RopeConfig, frequencies: np.ndarray, rotating: int) -> np.ndarray:
    """NTK-by-parts (YaRN, arXiv 2309.00071, section 3.2): a ramp over the pair's number, between two turn counts."""

    def pair(turns: float) -> float:  # the number of the pair that makes so many turns over original_length
        return rotating * math.log(cfg.original_length / (turns * 2 * math.pi)) / (2 * math.log(cfg.base))

    first, last = pair(cfg.beta_fast), pair(cfg.beta_slow)
    if cfg.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotating - 1)
    ramp = np.clip((np.arange(rotating // 2) - first) / max(last - first, 0.001), 0.0, 1.0)
    return ramp * frequencies / cfg.factor + (1 - ramp) * frequencies


def rotary_angles(cfg: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every pair's angle, made once a step and used by all layers.

    Args:
      positions: (B, T) int32.

    Returns:
      Two arrays (B, T, 1, R / 2) float32, to be broadcast over heads.
    """
    frequencies, scale = rotary_frequencies(cfg, head_dim)
    frequencies = jnp.asarray(frequencies, jnp.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (x_i, x_{i + R/2}) by their angles (arXiv 2104.09864, section 3.4.2; GPT-NeoX's pairing).

    Args:
      x: (B, T, N, H); the first R entries of each head turn, the others stay.
      angles: from `rotary_angles`.
    """
    cos, sin = angles
    turning = x[..., : 2 * cos.shape[-1]]
    # Whole heads, and not halves of them: a TPU's registers are as wide as a head of 128.
    other = jnp.concatenate(jnp.split(turning, 2, axis=-1)[::-1], -1)
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    turned = (at_least_float32(turning) * cos + at_least_float32(other) * sin).astype(x.dtype)
    return jnp.concatenate([turned, x[..., turning.shape[-1] :]], -1)


def relative_bucket(distance: jax.Array, buckets: int, max_distance: int, *, causal: bool = True) -> jax.Array:
    """T5's buckets (arXiv 1910.10683, section 2.1): half exact, half logarithmic.

    Args:
      distance: int32, how far the key lies behind the query.
      causal: those ahead count as 0; otherwise they have the second half of the buckets.

    Returns:
      int32 of the same shape in [0, buckets).
    """
    if not causal:
        half = relative_bucket(abs(distance), buckets // 2, max_distance)
        return half + jnp.where(distance < 0, buckets // 2, 0)
    distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    logarithmic = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(logarithmic, buckets - 1))
