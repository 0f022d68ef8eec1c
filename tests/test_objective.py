"""Cross-entropy, label smoothing and z-loss against float64 loops; sums, weights and the honest evaluation."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import MoEConfig
from llm_jax.kernels.cross_entropy import cross_entropy
from llm_jax.kernels.experts import Routing
from llm_jax.models.decoder import TokenLosses
from llm_jax.objectives.language import LanguageObjective

LOGITS = 3 * np.random.default_rng(0).normal(size=(2, 3, 5))
LOGITS[..., 4] = -np.inf  # an id that no text can have
TARGETS = np.array([[0, 1, 2], [3, 3, 0]], np.int32)
WEIGHTS = np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]], np.float32)


def cross_entropy_by_hand(logits, target, smoothing):
    """KL divergence of softmax(logits) from the smoothed one-hot target, and log Z."""
    possible = [i for i, x in enumerate(logits) if x > -math.inf]
    log_z = math.log(sum(math.exp(logits[i]) for i in possible))
    loss = 0.0
    for i in possible:
        wanted = smoothing / len(possible) + (1 - smoothing if i == target else 0.0)
        if wanted:
            loss += wanted * (math.log(wanted) - (logits[i] - log_z))
    return loss, log_z


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy(x64, smoothing):
    loss, log_z = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS), smoothing)
    assert loss.dtype == jnp.float64
    for place in np.ndindex(2, 3):
        expected = cross_entropy_by_hand(LOGITS[place], TARGETS[place], smoothing)
        np.testing.assert_allclose((loss[place], log_z[place]), expected, rtol=0, atol=1e-12)


def test_a_perfect_prediction_has_loss_0():
    """With smoothing, perfect is the smoothed target itself, and nothing is better."""
    target = np.full(4, 0.1 / 4)
    target[2] += 0.9
    loss, _ = cross_entropy(jnp.log(jnp.asarray(target)), jnp.array(2), 0.1)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.array(2), 0.1)[0])(jnp.log(jnp.asarray(target)))
    np.testing.assert_allclose(gradient, np.zeros(4), atol=1e-6)
    certain, _ = cross_entropy(jnp.array([0.0, 0.0, 1e4, 0.0]), jnp.array(2))
    assert certain == 0


def test_cross_entropy_in_bfloat16_is_computed_in_float32():
    logits = jnp.asarray(LOGITS[..., :4], jnp.bfloat16)
    loss, log_z = cross_entropy(logits, jnp.asarray(TARGETS))
    assert loss.dtype == log_z.dtype == jnp.float32
    expected, _ = cross_entropy_by_hand([float(x) for x in logits[0, 0]], 0, 0.0)
    np.testing.assert_allclose(loss[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_is_finite_with_impossible_ids(smoothing):
    def total(logits):
        loss, log_z = cross_entropy(logits, jnp.asarray(TARGETS), smoothing)
        return loss.sum() + (log_z**2).sum()

    gradient = np.asarray(jax.grad(total)(jnp.asarray(LOGITS, jnp.float32)))
    assert np.isfinite(gradient).all() and (gradient[..., 4] == 0).all()


# ------------------------------------------------------------------------------------------------- the terms


def token_losses(logits, tokens, targets, *places, rows, label_smoothing, chunk, dropout_key, method):
    """A model whose parameters are the logits."""
    assert method == "token_losses" and chunk == 0
    return TokenLosses(*cross_entropy(logits, jnp.asarray(targets), label_smoothing), logits.argmax(-1) == targets)


MODEL = SimpleNamespace(apply=token_losses)
ROUTING = Routing(balance=jnp.array([3.0, 5.0]), z=jnp.array([1.0, 2.0]), dropped=jnp.array([0.0, 4.0]))


def batch(weights=WEIGHTS):
    zeros = np.zeros_like(TARGETS)
    return {"tokens": zeros, "positions": zeros, "segment_ids": zeros, "targets": TARGETS, "loss_weights": weights}


def test_terms_are_weighted_sums_and_their_weights(x64):
    objective = LanguageObjective(z_loss=1e-4, label_smoothing=0.1)
    assert objective.coefficients() == {"loss": 1.0, "z_loss": 1e-4}
    assert {name: float(value) for name, value in objective.weights(batch()).items()} == {"loss": 4.5, "z_loss": 4.5}
    sums = objective.sums(MODEL, jnp.asarray(LOGITS), batch(), None)
    loss = z_loss = 0.0
    for place in np.ndindex(2, 3):
        nats, log_z = cross_entropy_by_hand(LOGITS[place], TARGETS[place], 0.1)
        loss += float(WEIGHTS[place]) * nats
        z_loss += float(WEIGHTS[place]) * log_z**2
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-12)
    np.testing.assert_allclose(sums["z_loss"], z_loss, rtol=1e-12)


def test_the_z_loss_gradient_is_that_of_the_papers():
    """d/dx (log p + c (log Z)^2) = softmax * (1 + 2 c log Z) - onehot (t5x losses.py)."""
    logits = jnp.asarray(LOGITS[0, 0, :4], jnp.float32)
    objective = LanguageObjective(z_loss=0.3)
    one = {name: jnp.ones((1, 1), jnp.int32) for name in ("tokens", "positions", "segment_ids", "targets")}
    one["loss_weights"] = jnp.ones((1, 1))

    def total(logits):
        sums = objective.sums(MODEL, logits[None, None], one, None)
        return sum(objective.coefficients()[name] * value for name, value in sums.items())

    log_z = np.log(np.exp(LOGITS[0, 0, :4]).sum())
    expected = np.exp(LOGITS[0, 0, :4] - log_z) * (1 + 2 * 0.3 * log_z) - np.eye(4)[1]
    np.testing.assert_allclose(jax.grad(total)(logits), expected, rtol=1e-4, atol=1e-6)


def test_terms_that_are_off_are_absent():
    objective = LanguageObjective()
    assert objective.coefficients() == {"loss": 1.0}
    assert objective.weights(batch()).keys() == {"loss"}
    assert objective.sums(MODEL, jnp.asarray(LOGITS), batch(), None).keys() == {"loss"}


def test_a_batch_of_padding_is_zero():
    objective = LanguageObjective(z_loss=1e-4, label_smoothing=0.1)
    nothing = batch(np.zeros_like(WEIGHTS))
    assert float(objective.weights(nothing)["loss"]) == 0
    total = lambda logits: sum(objective.sums(MODEL, logits, nothing, None).values())  # noqa: E731
    value, gradient = jax.value_and_grad(total)(jnp.asarray(LOGITS, jnp.float32))
    assert value == 0 and (np.asarray(gradient) == 0).all()


def test_evaluation_is_plain_cross_entropy(x64):
    """Whatever the training loss adds, so that runs compare."""
    data = batch() | {"target_bytes": np.array([[3, 0, 4], [0, 1, 2]], np.int32)}
    plain = LanguageObjective().evaluation(MODEL, jnp.asarray(LOGITS), data)
    rich = LanguageObjective(z_loss=0.1, label_smoothing=0.1).evaluation(MODEL, jnp.asarray(LOGITS), data)
    nats = sum(float(WEIGHTS[p]) * cross_entropy_by_hand(LOGITS[p], TARGETS[p], 0.0)[0] for p in np.ndindex(2, 3))
    correct = sum(float(WEIGHTS[p]) * (LOGITS[p].argmax() == TARGETS[p]) for p in np.ndindex(2, 3))
    for found in (plain, rich):
        np.testing.assert_allclose(found["nats"], nats, rtol=1e-12)
        assert float(found["tokens"]) == 4.5 and float(found["correct"]) == correct and float(found["bytes"]) == 10
    assert "bytes" not in LanguageObjective().evaluation(MODEL, jnp.asarray(LOGITS), batch())


def test_routing_terms_are_means_over_real_tokens_and_layers():
    """3 real tokens of 6, in 5 layers; the share dropped is of each token's 2 choices, and weighs nothing."""
    model = SimpleNamespace(apply=lambda *args, **options: token_losses(*args, **options)._replace(routing=ROUTING))
    moe = MoEConfig(num_experts=4, top_k=2, balance_loss=0.01, router_z_loss=1e-3)
    objective = LanguageObjective(moe=moe, num_layers=5)
    assert objective.coefficients() == {
        "loss": 1.0, "router_balance": 0.01, "router_z": 1e-3, "router_dropped": 0.0
    }  # fmt: skip
    packed = batch() | {"segment_ids": np.array([[1, 2, 0], [1, 0, 0]], np.int32)}
    weights = objective.weights(packed)
    assert {name: float(weight) for name, weight in weights.items()} == {
        "loss": 4.5, "router_balance": 15.0, "router_z": 15.0, "router_dropped": 30.0
    }  # fmt: skip
    sums = objective.sums(model, jnp.asarray(LOGITS), packed, None)
    assert sums.keys() == weights.keys()
    assert [float(sums[f"router_{name}"]) for name in ("balance", "z", "dropped")] == [8.0, 3.0, 4.0]
    whole_rows = LanguageObjective(moe=moe, segments=False).weights(packed)
    assert float(whole_rows["router_z"]) == 6.0
