"""Random keys: every stream is a pure function of (seed, name, step), so no key is ever stored in a checkpoint."""

import math
import zlib

import jax
import jax.numpy as jnp


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
    block: dropout's masks are most of a model's random numbers.

    Args:
      key: a typed threefry key, scalar.
      lines: integers (shape[:-1]), the lines' numbers: of some lines of a larger array. None: 0, 1, 2, ...
    """
    *before, size = shape or (1,)
    blocks = (*before, -(-size // 4))
    lines = jnp.arange(math.prod(before)) if lines is None else lines
    line = lines.astype(jnp.uint32).reshape(*before, 1)
    place = jax.lax.broadcasted_iota(jnp.uint32, blocks, len(before))
    # The barrier: words are made once, not once for each of what reads them.
    words = jax.lax.optimization_barrier(threefry(jax.random.key_data(key), jnp.broadcast_to(line, blocks), place))
    halves = [half.astype(jnp.uint16) for word in words for half in (word & 0xFFFF, word >> 16)]
    # A quarter of the line each: woven into one another they would cost CPUs more than the cipher.
    return jnp.concatenate(halves, axis=-1)[..., :size].reshape(shape)


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@jax.jit
def threefry(key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2).

    The numbers of jax's own primitive, which on CPUs is a loop with its state in memory; this one is a single pass, and
    made a step of BERT with dropout a twentieth faster.

    Args:
      key: (2,) uint32.
      x, y: uint32 of one shape, the counter.

    Returns:
      Two uint32 of that shape.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << distance | y >> 32 - distance)
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
