"""Schedules of the learning rate against formulas in float64, and those that cannot be."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config.schema import OptimConfig
from llm_jax.errors import ConfigError
from llm_jax.training import optim


def rates(cfg, total, steps):
    schedule = jax.jit(optim.learning_rate(cfg, total))
    return [float(schedule(jnp.int32(i))) for i in steps]


def test_nanogpt_schedule():
    cfg = OptimConfig(learning_rate=1e-3, warmup_steps=100, decay_steps=5000, final_ratio=0.1)
    cosine = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (i - 100) / 4900)) for i in (101, 4999)]
    steps = [0, 1, 99, 100, 101, 2550, 4999, 5000, 5001, 9000]
    expected = [1e-3 / 101, 2e-3 / 101, 1e-3 * 100 / 101, 1e-3]
    expected += [cosine[0], 5.5e-4, cosine[1], 1e-4, 1e-4, 1e-4]
    np.testing.assert_allclose(rates(cfg, 5001, steps), expected, rtol=3e-6)
    # 5001 updates end at update 5000, so that decay_steps is what it would be by default
    default = OptimConfig(learning_rate=1e-3, warmup_steps=100)
    assert rates(default, 5001, steps) == rates(cfg, 5001, steps)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("(i+1)/(w+1)", [0.2, 0.4, 0.6, 0.8, 1.0]),
        ("(i+1)/w", [0.25, 0.5, 0.75, 1, 1]),
        ("i/w", [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_warmup_forms(form, expected):
    cfg = OptimConfig(learning_rate=1.0, schedule="constant", warmup_steps=4, warmup_form=form)
    np.testing.assert_allclose(rates(cfg, 10, range(5)), expected, rtol=1e-6)


def test_linear_schedule_and_warmup_ratio():
    cfg = OptimConfig(learning_rate=2.0, schedule="linear", warmup_ratio=0.2, final_ratio=0.5)  # w = 2, T = 10
    np.testing.assert_allclose(rates(cfg, 11, [1, 2, 6, 10, 30]), [2 * 2 / 3, 2, 1.5, 1, 1], rtol=1e-6)


def test_wsd_schedule_as_modded_nanogpt():
    cfg = OptimConfig(
        learning_rate=1.8e-3, schedule="wsd", warmup_steps=256, warmup_form="(i+1)/w", decay_steps=9536,
        cooldown_ratio=2048 / 9536, final_ratio=0.0,
    )  # fmt: skip
    steps = [0, 255, 256, 7488, 7489, 8512, 9535]
    expected = [1.8e-3 / 256, 1.8e-3, 1.8e-3, 1.8e-3, 1.8e-3 * 2047 / 2048, 0.9e-3, 1.8e-3 / 2048]
    np.testing.assert_allclose(rates(cfg, 9536, steps), expected, rtol=1e-5)


def test_inverse_sqrt_schedule():
    cfg = OptimConfig(learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=4, warmup_form="(i+1)/w")
    np.testing.assert_allclose(rates(cfg, 100, [0, 3, 4, 16, 64]), [0.25, 1, 1, 0.5, 0.25], rtol=1e-6)
    cfg = OptimConfig(learning_rate=1.0, schedule="inverse_sqrt")
    np.testing.assert_allclose(rates(cfg, 100, [0, 3, 15]), [1, 0.5, 0.25], rtol=1e-6)


def test_a_warmup_and_a_cooldown_may_fill_the_run():
    cfg = OptimConfig(learning_rate=1.0, schedule="wsd", warmup_steps=2, cooldown_ratio=0.8, final_ratio=0.0)
    np.testing.assert_allclose(rates(cfg, 10, [1, 2, 9]), [2 / 3, 1, 0], atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
def test_a_run_of_one_update_has_the_peak_rate(schedule):
    assert rates(OptimConfig(learning_rate=0.5, schedule=schedule), 1, [0]) == [0.5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(warmup_steps=10), "would never reach its peak"),
        (dict(warmup_steps=2, warmup_ratio=0.1), "warmup_ratio = 0.1 is set too"),
        (dict(warmup_steps=5, decay_steps=5), "warm-up lasts until update 5"),
        (dict(schedule="wsd", warmup_steps=5, cooldown_ratio=0.8), "do not fit"),
    ],
)
def test_schedules_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        optim.learning_rate(OptimConfig(**changes), 10)
