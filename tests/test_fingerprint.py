"""Fingerprints: the same on every mesh, another for any changed bit, no gathering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.training.fingerprint import _fingerprint, fingerprint


def reference(a):
    """The definition, in Python integers."""
    a = np.asarray(a)
    bits = a.astype(np.uint8) if a.dtype == bool else a.view({1: np.uint8, 2: np.uint16}.get(a.itemsize, np.uint32))
    numbers = [int(n) for n in bits.ravel()]
    return [sum(numbers) % 2**32, sum(n * (2 * i + 1) for i, n in enumerate(numbers)) % 2**32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 5)])
def test_the_sums_are_those_of_the_definition(dtype, shape):
    a = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 10, dtype)
    assert fingerprint({"a": a}) == {"a": reference(a)}


def test_float64(x64):
    a = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    assert fingerprint({"a": a}) == {"a": reference(a)}


def test_any_changed_bit_and_any_exchanged_elements_show():
    a = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    seen = {tuple(fingerprint({"a": jnp.asarray(a)})["a"])}
    for bit in range(32):
        b = a.copy()
        b.view(np.uint32)[2, 3] ^= np.uint32(1 << bit)
        seen.add(tuple(fingerprint({"a": jnp.asarray(b)})["a"]))
    b = a.copy()
    b[[0, 1]] = b[[1, 0]]
    seen.add(tuple(fingerprint({"a": jnp.asarray(b)})["a"]))
    assert len(seen) == 34


def test_no_mesh_changes_it_and_nothing_is_gathered():
    arrays = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.float32), "n": jnp.ones(8)}
    expected = fingerprint(arrays)
    for shape, spec in (((8, 1), ("x",)), ((4, 2), ("x", "y")), ((2, 4), (None, ("x", "y"))), ((1, 8), ())):
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        shardings = {"w": NamedSharding(mesh, PartitionSpec(*spec)), "n": NamedSharding(mesh, PartitionSpec())}
        placed = jax.device_put(arrays, shardings)
        assert fingerprint(placed) == expected
        compiled = _fingerprint(NamedSharding(mesh, PartitionSpec())).lower(placed).compile().as_text()
        assert "all-gather" not in compiled and "all-to-all" not in compiled


def test_nothing_has_no_fingerprint():
    assert fingerprint({}) == {}
