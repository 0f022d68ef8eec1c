"""Random bits: as jax's own cipher makes them, of the right frequencies, none related to its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from llm_jax.models.layers import dropout
from llm_jax.rng import bits16, stream
from llm_jax.sharding import Layout


def test_four_numbers_are_one_block_of_threefry():
    key = jax.random.key(3)
    found = bits16(key, (2, 3, 6)).reshape(6, 6)  # two blocks a line, of which the last numbers are cut
    for line in range(6):
        blocks = [
            threefry_2x32(jax.random.key_data(key), jnp.array([line, block], jnp.uint32)).tolist() for block in (0, 1)
        ]
        expected = [words[word] >> shift & 0xFFFF for word in (0, 1) for shift in (0, 16) for words in blocks]
        assert found[line].tolist() == expected[:6]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 7)])
def test_any_shape(shape):
    found = bits16(jax.random.key(0), shape)
    assert found.shape == shape and found.dtype == jnp.uint16


def test_streams_are_of_threefry_whatever_jax_takes_otherwise():
    with jax.default_prng_impl("rbg"):
        assert jax.random.key_data(stream(0, "dropout", 3)).tolist() == [3_426_209_264, 4_155_611_042]


def test_bits_are_fair_and_unrelated():
    """2**20 numbers: each bit, and its agreement with that of any neighbour, within 5 standard errors of a half."""
    keys = jax.random.split(jax.random.key(0), 2)
    bits = np.unpackbits(np.stack([bits16(key, (512, 1024)) for key in keys]).view(np.uint8), axis=-1).astype(np.int8)
    error = 5 * 0.5 / np.sqrt(2**19)
    by_bit = bits.reshape(-1, 16)
    np.testing.assert_allclose(by_bit.mean(0), 0.5, atol=error)
    neighbours = {"key": (0, 1), "line": (1, 1), "number": (2, 16), "bit": (2, 1)}
    neighbours |= {"half": (2, 16 * 256), "word": (2, 16 * 512)}
    for name, (axis, distance) in neighbours.items():
        there = np.take(bits, np.arange(distance, bits.shape[axis]), axis)
        here = np.take(bits, np.arange(bits.shape[axis] - distance), axis)
        assert abs((there == here).mean() - 0.5) < 5 * 0.5 / np.sqrt(here.size), name


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1e-6, 0.999999])
def test_dropout_keeps_the_mean(rate):
    x = jnp.ones((4, 256, 250))
    found = np.asarray(dropout(x, rate, jax.random.key(1), jnp.arange(4), Layout(), None, None, None), np.float64)
    kept = max(round((1 - rate) * 2**16), 1) / 2**16
    assert set(np.unique(found)) <= {0.0, np.float64(np.float32(1 / kept))}
    share = (found > 0).mean()
    assert abs(share - kept) <= 5 * np.sqrt(kept * (1 - kept) / found.size)
    assert abs(kept - (1 - rate)) <= 2**-16
