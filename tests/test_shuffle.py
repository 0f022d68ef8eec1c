"""Permutations and draws that are functions of a key and a number."""

import collections
import math

import numpy as np
import pytest

from llm_jax.data.shuffle import draw, permute, stream_key


@pytest.mark.parametrize("size", [1, 2, 3, 5, 31, 64, 65, 1000, 4097])
def test_permutations_are_permutations(size):
    for epoch in range(3):
        sent = permute(np.arange(size), size, stream_key(0, "rows", epoch))
        assert sorted(sent.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [3, 4])
def test_all_permutations_of_a_few_rows_are_equally_likely(size):
    draws = 1000
    seen = collections.Counter(tuple(permute(np.arange(size), size, stream_key(seed, "a"))) for seed in range(draws))
    expected = draws / math.factorial(size)
    chi_squared = sum((seen[order] - expected) ** 2 / expected for order in seen)
    chi_squared += (math.factorial(size) - len(seen)) * expected
    freedom = math.factorial(size) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_a_permutation_looks_random():
    size, orders = 2000, 60
    sent = np.array([permute(np.arange(size), size, stream_key(seed, "a")) for seed in range(orders)])
    fixed, followed = (sent == np.arange(size)).sum(), (np.diff(sent) == 1).sum()
    for count in (fixed, followed):  # Poisson with mean 1 an order
        assert abs(count - orders) < 4 * math.sqrt(orders)
    places = np.tile(np.arange(size), (orders, 1))
    for left, right in ((sent, places), (sent[:, 1:], sent[:, :-1]), (sent[1:], sent[:-1])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 4 / math.sqrt(left.size)


def test_an_index_does_not_depend_on_those_asked_for_with_it():
    key = stream_key(1, "a")
    whole = permute(np.arange(100), 100, key)
    np.testing.assert_array_equal(permute(np.array([70, 3, 70]), 100, key), whole[[70, 3, 70]])


def test_huge_sizes_take_no_memory():
    size = 10**15 + 7
    sent = permute(np.arange(size - 1000, size), size, stream_key(1, "a"))
    assert len(set(sent.tolist())) == 1000 and sent.min() >= 0 and sent.max() < size
    assert sent.std() > size / 5


def test_keys_differ_by_seed_and_by_every_name():
    keys = [
        stream_key(0, "a", 1),
        stream_key(1, "a", 1),
        stream_key(0, "b", 1),
        stream_key(0, "a", 2),
        stream_key(0, "a"),
    ]
    assert len({tuple(key.tolist()) for key in keys}) == len(keys)


def test_the_order_is_the_same_for_ever():
    """A change here would give every run in progress another data order: raise mixture.ORDER_VERSION with it."""
    assert permute(np.arange(10), 10, stream_key(0, "data", 0)).tolist() == [1, 6, 2, 3, 9, 5, 7, 0, 4, 8]
    assert draw(np.arange(5), 1000, stream_key(0, "data")).tolist() == [391, 366, 345, 118, 26]


def test_draws_are_uniform_and_independent():
    drawn = draw(np.arange(100_000), 50, stream_key(3, "a"))
    counts = np.bincount(drawn, minlength=50)
    assert len(counts) == 50
    assert ((counts - 2000) ** 2 / 2000).sum() < 49 + 4 * math.sqrt(2 * 49)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4 / math.sqrt(100_000)


def test_draws_reach_the_ends_of_huge_ranges():
    drawn = draw(np.arange(10**12, 10**12 + 10_000), 10**13, stream_key(3, "a"))
    assert 0 <= drawn.min() < 10**10 and 10**13 - 10**10 < drawn.max() < 10**13
