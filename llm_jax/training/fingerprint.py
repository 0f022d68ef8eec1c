"""A few numbers that stand for every bit of a tree of arrays, on whatever mesh it lies."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Arrays = dict[str, jax.Array]  # by path, as "params/blocks/up/kernel"


def fingerprint(arrays: Arrays) -> dict[str, list[int]]:
    """Two 32-bit sums over the bits of each array, the same on every mesh and process.

    With u the elements' bits as unsigned integers and i their row-major index: sum(u) and sum(u * (2i + 1)), modulo
    2^32. Any single changed bit changes both; nothing is gathered, each device sums its own part.
    """
    if not arrays:
        return {}
    meshes = [a.sharding.mesh for a in arrays.values() if isinstance(a.sharding, NamedSharding)]
    sums = np.asarray(_fingerprint(NamedSharding(meshes[0], PartitionSpec()) if meshes else None)(arrays))
    return {path: [int(n) for n in row] for path, row in zip(sorted(arrays), sums, strict=True)}


@functools.lru_cache
def _fingerprint(replicated: NamedSharding | None) -> Callable[[Arrays], jax.Array]:
    def sums(arrays: Arrays) -> jax.Array:
        return jnp.stack([_sums(arrays[path]) for path in sorted(arrays)])

    return jax.jit(sums) if replicated is None else jax.jit(sums, out_shardings=replicated)


def _sums(a: jax.Array) -> jax.Array:
    a = jax.device_put(a, jax.memory.Space.Device)  # from where an optimizer state may wait
    if a.dtype == bool:
        a = a.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[a.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(a, unsigned).astype(jnp.uint32)  # 8 bytes: a last axis of two
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * (2 * index + 1)).sum(dtype=jnp.uint32)])
