"""Transformers' GPT-2 without torch: its logits and the losses of ten AdamW steps, stored by a committed script."""

import ast
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from from_torch import gpt2
from tiny import QUICK, build

from llm_jax.config import DecoderConfig, OptimConfig
from llm_jax.objectives.language import LanguageObjective
from llm_jax.sharding import Layout
from llm_jax.training import optim, step
from llm_jax.training import state as train_state

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = DecoderConfig(
    vocab_size=61, num_layers=2, embed_dim=32, num_heads=4, max_length=16, positions="learned", norm="layernorm",
    activation="gelu_tanh", bias="all",
)  # fmt: skip


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_gpt2_reference", GOLDEN / "make_gpt2_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(maker):
    """The stored arrays, and the parameters they were computed from."""
    stored = np.load(GOLDEN / "gpt2_reference.npz")
    shapes = {name: ast.literal_eval(shape) for name, shape in zip(stored["names"], stored["shapes"], strict=True)}
    return stored, gpt2(maker.weights(shapes), CONFIG.num_layers)


def test_logits_are_those_of_transformers(maker, reference):
    stored, params = reference
    model = build(CONFIG)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())
    logits = jax.jit(model.apply, compiler_options=QUICK)(params, maker.batch(0)[0])
    np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=2e-5)


def test_ten_adamw_steps_are_those_of_torch(maker, reference):
    stored, params = reference
    model = build(CONFIG)
    cfg = OptimConfig(
        learning_rate=maker.PEAK, final_ratio=maker.FINAL / maker.PEAK, warmup_steps=maker.WARMUP,
        beta1=maker.BETAS[0], beta2=maker.BETAS[1], eps=maker.EPS, weight_decay=maker.WEIGHT_DECAY,
        clip_norm=maker.CLIP,
    )  # fmt: skip
    tx = optim.make(cfg, maker.STEPS, model.shapes(), model.axes())
    abstract = train_state.abstract(model, tx, Layout(), ema=False)
    rate = optim.learning_rate(cfg, maker.STEPS)
    train_step = step.make_train_step(model, LanguageObjective(), tx, rate, Layout(), abstract, seed=0)

    def batch(i):
        tokens, targets = maker.batch(i)
        ones = np.ones_like(tokens)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return {
            "tokens": tokens, "targets": targets, "positions": positions, "segment_ids": ones,
            "loss_weights": ones.astype(np.float32),
        }  # fmt: skip

    state = train_state.fresh(jax.tree.map(jnp.asarray, params), tx, ema=False)
    compiled, losses = train_step.lower(state, batch(0)).compile(compiler_options=QUICK), []
    for i in range(maker.STEPS):
        state, metrics = compiled(state, batch(i))
        losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(metrics["learning_rate"], maker.rate(i), rtol=1e-5)
    np.testing.assert_allclose(losses, stored["losses"], rtol=0, atol=2e-4)
    assert losses[-1] < losses[0] - 0.3  # and it learns
