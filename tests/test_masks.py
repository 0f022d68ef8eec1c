"""Attention masks as literal arrays: row = query, column = key, 1 = seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.masks import AttentionMask, causal_mask


def dense(mask):
    return np.asarray(mask.dense()).astype(int).tolist()


def test_causal():
    assert dense(causal_mask(4)) == [
        [
            [1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
        ]
    ]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        (2, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
        (4, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        (9, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_window_counts_the_token_itself(window, expected):
    assert dense(causal_mask(4, window=window)) == [expected]


def test_a_window_without_causality_is_half_on_each_side():
    index = jnp.arange(4)
    mask = AttentionMask(index, index, causal=False, window=2)
    assert dense(mask) == [[[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]]
    assert mask.reach() == (1, 1)
    assert causal_mask(4, window=2).reach() == (1, 0) and causal_mask(4).reach() is None


def test_without_causality_all_is_seen():
    index = jnp.arange(3)
    assert dense(AttentionMask(index, index, causal=False)) == [[[1, 1, 1]] * 3]


def test_segments_and_padding():
    segments = jnp.array([[1, 1, 2, 0], [3, 3, 3, 3]])
    assert dense(causal_mask(4, segments)) == [
        [
            [1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 0],
        ],
        [
            [1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
        ],
    ]


def test_padding_in_front_sees_nothing_and_is_not_seen():
    assert dense(causal_mask(3, jnp.array([[0, 0, 1]]))) == [[[0, 0, 0], [0, 0, 0], [0, 0, 1]]]


def test_segments_with_a_window():
    segments = jnp.array([[1, 1, 1, 2, 2]])
    assert dense(causal_mask(5, segments, window=2)) == [
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 1, 1],
        ]
    ]


def test_segments_without_causality():
    index = jnp.arange(3)
    segments = jnp.array([[1, 1, 2]])
    mask = AttentionMask(index, index, segments, segments, causal=False)
    assert dense(mask) == [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]


def test_decoding_rows_at_different_places():
    mask = AttentionMask(jnp.array([[2], [0]]), jnp.arange(4))
    assert dense(mask) == [[[1, 1, 1, 0]], [[1, 0, 0, 0]]]
    mask = AttentionMask(jnp.array([[3], [1]]), jnp.arange(4), window=2)
    assert dense(mask) == [[[0, 0, 1, 1]], [[1, 1, 0, 0]]]


def test_prefill_of_rows_of_different_lengths():
    """A place beyond the cache (here 3 of 3) is padding: what it sees does not matter, nobody sees it."""
    mask = AttentionMask(jnp.array([[0, 1, 2], [0, 3, 3]]), jnp.arange(3))
    assert dense(mask) == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1], [1, 1, 1]]]


def test_distance():
    index = jnp.arange(3)
    assert np.asarray(AttentionMask(index, index).distance()).tolist() == [[[0, -1, -2], [1, 0, -1], [2, 1, 0]]]
    mask = AttentionMask(jnp.array([[2], [0]]), jnp.arange(2))
    assert np.asarray(mask.distance()).tolist() == [[[2, 1]], [[0, -1]]]


def test_rows_in_another_order():
    """Tokens 0, 3, 1, 2 of a packed row, as they stand."""
    mask = causal_mask(4, jnp.array([[1, 2, 1, 2]]), order=np.array([0, 3, 1, 2]))
    assert dense(mask) == [[[1, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 1]]]
    with pytest.raises(ValueError, match="in order"):
        mask.check_in_order()
    causal_mask(4).check_in_order()
