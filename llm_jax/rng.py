"""Random keys: every stream is a pure function of (seed, name, step), so no key is ever stored in a checkpoint."""

import math
import zlib

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p


def stream(seed: int | jax.Array, name: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of stream `name` at `step`: a typed threefry key, scalar.

    Streams with different names are independent; `step` may be traced. The name enters through CRC-32, which is the
    same in every process and Python version (unlike `hash`).
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def bits16(key: jax.Array, shape: tuple[int, ...], lines: jax.Array | None = None) -> jax.Array:
    """Uniform uint16 of `shape`: the threefry cipher of each one's line and place in it.

    `jax.random.bits` makes a block of 64 bits for each number and keeps as many as it needs; here four numbers share a
    block, and the masks of dropout, most of a model's random numbers, take a quarter of the time.

    Args:
      key: a typed threefry key, scalar.
      lines: integers (shape[:-1]), the lines' numbers: of some lines of a larger array. None: 0, 1, 2, ...
    """
    *before, size = shape or (1,)
    blocks = (*before, -(-size // 4))
    lines = jnp.arange(math.prod(before)) if lines is None else lines
    line = lines.astype(jnp.uint32).reshape(*before, 1)
    place = jax.lax.broadcasted_iota(jnp.uint32, blocks, len(before))
    words = jnp.stack(threefry2x32_p.bind(*jax.random.key_data(key), jnp.broadcast_to(line, blocks), place), axis=-1)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)  # (..., N / 4, 2, 2)
    return halves.reshape(*before, 4 * blocks[-1])[..., :size].reshape(shape)
