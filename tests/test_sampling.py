"""Which tokens may be drawn, as literal sets, and how often they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import GenerateConfig
from llm_jax.generation.sampling import filtered, sample

# probabilities of tokens 0 .. 4; token 3 is the likeliest
PROBABILITIES = [0.15, 0.05, 0.25, 0.5, 0.05]


def kept(probabilities=PROBABILITIES, **changes):
    cfg = GenerateConfig(**{"temperature": 1.0, **changes})
    logits = filtered(jnp.log(jnp.asarray([probabilities])), cfg)
    return set(np.flatnonzero(np.isfinite(np.asarray(logits[0]))).tolist())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        (dict(top_k=1), {3}),
        (dict(top_k=2), {2, 3}),
        (dict(top_k=3), {0, 2, 3}),
        (dict(top_k=4), {0, 1, 2, 3, 4}),  # 1 and 4 tie for the fourth place
        (dict(top_k=5), {0, 1, 2, 3, 4}),
        (dict(top_k=50), {0, 1, 2, 3, 4}),
        (dict(top_p=0.01), {3}),  # the likeliest always may
        (dict(top_p=0.49), {3}),
        (dict(top_p=0.6), {2, 3}),
        (dict(top_p=0.74), {2, 3}),
        (dict(top_p=0.8), {0, 2, 3}),
        (dict(top_p=0.92), {0, 1, 2, 3, 4}),  # a tie again
        (dict(top_p=1.0), {0, 1, 2, 3, 4}),
        (dict(min_p=1.0), {3}),
        (dict(min_p=0.6), {3}),
        (dict(min_p=0.4), {2, 3}),
        (dict(min_p=0.2), {0, 2, 3}),
        (dict(min_p=0.05), {0, 1, 2, 3, 4}),
        # one after the other, each on what the one before left: of {2, 3}, 3 alone has 2/3
        (dict(top_k=2, top_p=0.6), {3}),
        (dict(top_k=2, top_p=0.7), {2, 3}),
        (dict(top_k=3, min_p=0.4), {2, 3}),
        (dict(top_p=0.8, min_p=0.4), {2, 3}),
        (dict(top_k=4, top_p=0.8, min_p=0.6), {3}),
        # a high temperature evens the probabilities before they are counted: .20 .15 .23 .27 .15
        (dict(temperature=4.0, top_p=0.6), {0, 2, 3}),
        (dict(temperature=0.25, top_p=0.6), {3}),
        (dict(temperature=4.0, min_p=0.8), {2, 3}),
    ],
    ids=str,
)
def test_which_tokens_may_be_drawn(changes, expected):
    assert kept(**changes) == expected


@pytest.mark.parametrize("changes", [dict(top_k=1), dict(top_p=0.1), dict(min_p=1.0)], ids=str)
def test_ties_for_the_first_place_all_stay(changes):
    assert kept([0.4, 0.2, 0.4], **changes) == {0, 2}


def test_impossible_tokens_stay_impossible():
    for changes in ({}, dict(top_k=3), dict(top_p=0.999999), dict(min_p=1e-9)):
        assert kept([0.5, 0.0, 0.5], **changes) == {0, 2}


def test_rows_are_filtered_by_themselves():
    logits = jnp.log(jnp.asarray([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))
    out = filtered(logits, GenerateConfig(temperature=1.0, top_p=0.75))
    assert np.isfinite(out).tolist() == [[True, True, False], [False, False, True]]


def test_greedy_takes_the_likeliest():
    logits = jnp.asarray([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0], [-jnp.inf, -1e9, -jnp.inf]])
    keys = jax.random.split(jax.random.key(0), 3)
    assert sample(logits, keys, GenerateConfig(temperature=0.0)).tolist() == [1, 0, 1]
    assert sample(logits, keys, GenerateConfig(temperature=0.0, top_k=2, top_p=0.5)).tolist() == [1, 0, 1]
    assert sample(logits, keys, GenerateConfig()).dtype == jnp.int32


@pytest.mark.parametrize("changes", [{}, dict(temperature=2.0), dict(top_k=3, temperature=0.7)], ids=str)
def test_frequencies_are_the_probabilities(changes):
    cfg = GenerateConfig(**{"temperature": 1.0, **changes})
    logits = jnp.log(jnp.asarray([PROBABILITIES]))
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    drawn = jax.jit(lambda keys: sample(jnp.broadcast_to(logits, (draws, 5)), keys, cfg))(keys)
    expected = np.asarray(jax.nn.softmax(filtered(logits, cfg)))[0]
    wanted = np.power(PROBABILITIES, 1 / cfg.temperature) * [i in kept(**changes) for i in range(5)]
    np.testing.assert_allclose(expected, wanted / wanted.sum(), rtol=1e-5)
    found = np.bincount(drawn, minlength=5) / draws
    assert (np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / draws) + 1e-12).all()


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)))
    keys = jax.random.split(jax.random.key(2), 4)
    together = sample(logits, keys, GenerateConfig())
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], GenerateConfig())[0]) for i in range(4)]
    assert together.tolist() == alone
