"""Randomness without state: permutations and draws that are pure functions of a key and a number.

Element i of an order costs the same for any i, so a data stream needs no buffer, no pass over what was already drawn,
and no state but one counter. (Grain's own index shuffle walks a 16-bit domain: milliseconds an index for a hundred
rows, and for a handful of rows it leaves them in order far too often.)
"""

import hashlib

import numpy as np

# Constants of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SMALLEST_DOMAIN = 6  # bits; with 4, eight rounds are measurably not enough to reach all orders of a few rows equally


def stream_key(seed: int, *names: object) -> np.ndarray:
    """(8,) uint64: the key of one stream; keys of different seeds or names have nothing in common (BLAKE2b)."""
    return np.frombuffer(hashlib.blake2b(repr((seed, *names)).encode()).digest(), "<u8").astype(np.uint64)


def permute(numbers: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a random permutation of range(size), chosen by `key`, sends `numbers`.

    A Feistel network of eight rounds on the next power of two, walked until it falls into the range (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"). Time and memory do not depend on `size`.

    Args:
      numbers: (n,) integers in [0, size).
      size: up to 2**62.
      key: of `stream_key`.

    Returns:
      (n,) int64.
    """
    bits = max((size - 1).bit_length(), _SMALLEST_DOMAIN)
    places = numbers.astype(np.uint64)
    walking = np.arange(len(places))
    while walking.size:
        places[walking] = _feistel(places[walking], bits, key)
        walking = walking[places[walking] >= np.uint64(size)]
    return places.astype(np.int64)


def draw(numbers: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """(n,) int64: independent draws from range(size), one for each of the non-negative `numbers`. `size` < 2**53."""
    return np.minimum((uniform(numbers, key) * size).astype(np.int64), size - 1)  # the product may round up to size


def uniform(numbers: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Float64 of the shape of the non-negative `numbers`: an independent draw from [0, 1) for each of them."""
    return (_mix(key[0] + numbers.astype(np.uint64) * _STEP) >> np.uint64(11)) * 2.0**-53


def _feistel(numbers: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """A permutation of range(2**bits). Halves of unequal width swap their widths with their places."""
    high_bits, low_bits = bits // 2, bits - bits // 2
    high, low = numbers >> np.uint64(low_bits), numbers & np.uint64(2**low_bits - 1)
    for word in key:
        high, low = low, high ^ (_mix(low ^ word) >> np.uint64(64 - high_bits))
        high_bits, low_bits = low_bits, high_bits
    return (high << np.uint64(low_bits)) | low


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * _FACTORS[0]
    words = (words ^ (words >> np.uint64(27))) * _FACTORS[1]
    return words ^ (words >> np.uint64(31))
