"""Random keys: every stream is a pure function of (seed, name, step), so no key is ever stored in a checkpoint."""

import zlib

import jax


def stream(seed: int | jax.Array, name: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of stream `name` at `step`: a typed threefry key, scalar.

    Streams with different names are independent; `step` may be traced. The name enters through CRC-32, which is the
    same in every process and Python version (unlike `hash`).
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)
