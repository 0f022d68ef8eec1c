"""Our decoder as GPT-2 against transformers in torch: logits, gradients, and a hundred steps of training."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from from_torch import gpt2
from tiny import assert_close, build

from llm_jax.config import DecoderConfig, OptimConfig
from llm_jax.objectives.language import LanguageObjective
from llm_jax.sharding import Layout
from llm_jax.training import optim, step
from llm_jax.training import state as train_state

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
pytest.importorskip("transformers", reason="needs transformers (the extra `parity`)")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIG = DecoderConfig(
    vocab_size=61, num_layers=2, embed_dim=32, num_heads=4, max_length=16, positions="learned", norm="layernorm",
    activation="gelu_tanh", bias="all",
)  # fmt: skip
STEPS, WARMUP = 100, 10


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_gpt2_reference", GOLDEN / "make_gpt2_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays(state):
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def features(tokens, targets):
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens, "targets": targets, "positions": positions, "segment_ids": ones,
        "loss_weights": ones.astype(np.float32),
    }  # fmt: skip


def test_the_stored_reference_is_current(maker):
    theirs, _ = maker.gpt2()
    stored = np.load(GOLDEN / "gpt2_reference.npz")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(maker.batch(0)[0]).long()).logits.numpy()
    np.testing.assert_allclose(logits, stored["logits"], atol=1e-5)


def test_logits_and_gradients(maker):
    theirs, _ = maker.gpt2()
    model, params = build(CONFIG), gpt2(arrays(theirs.state_dict()), CONFIG.num_layers)
    tokens, targets = maker.batch(0)
    logits = theirs(torch.from_numpy(tokens).long()).logits
    np.testing.assert_allclose(jax.jit(model.apply)(params, tokens), logits.detach().numpy(), rtol=0, atol=1e-4)

    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten()).backward()
    gradients = {name: value.grad.numpy() for name, value in theirs.named_parameters()}
    gradient = functools.partial(step.gradients, model, LanguageObjective(), layout=Layout(), seed=0, step=0)
    ours, _, _ = jax.jit(gradient)(params, features(tokens, targets))
    assert_close(jax.tree.map(np.asarray, ours), gpt2(gradients, CONFIG.num_layers), atol=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_hundred_steps_of_training(maker, accumulation):
    """The same weights and batches: AdamW, warm-up and cosine, clipping; losses within 1e-3, parameters close."""
    theirs, _ = maker.gpt2()
    model, params = build(CONFIG), gpt2(arrays(theirs.state_dict()), CONFIG.num_layers)
    batches = [maker.batch(i) for i in range(STEPS)]
    expected = maker.adamw(theirs, batches, [maker.rate(i, STEPS, WARMUP) for i in range(STEPS)])

    cfg = OptimConfig(
        learning_rate=maker.PEAK, final_ratio=maker.FINAL / maker.PEAK, warmup_steps=WARMUP, beta1=maker.BETAS[0],
        beta2=maker.BETAS[1], eps=maker.EPS, weight_decay=maker.WEIGHT_DECAY, clip_norm=maker.CLIP,
    )  # fmt: skip
    tx = optim.make(cfg, STEPS, model.shapes(), model.axes())
    abstract = train_state.abstract(model, tx, Layout(), ema=False)
    rate = optim.learning_rate(cfg, STEPS)
    train_step = step.make_train_step(
        model, LanguageObjective(), tx, rate, Layout(), abstract, seed=0, accumulation=accumulation
    )
    state, losses = train_state.fresh(jax.tree.map(jnp.asarray, params), tx, ema=False), []
    for tokens, targets in batches:
        state, metrics = train_step(state, features(tokens, targets))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)
    assert losses[-1] < losses[0] - 1.5
    found, wanted = jax.tree.map(np.asarray, state.params), gpt2(arrays(theirs.state_dict()), CONFIG.num_layers)
    for tree in (found, wanted):  # its gradient is 0 but for rounding, which Adam makes full steps of
        del tree["stack"]["blocks"]["attention"]["key"]["bias"]
    assert_close(found, wanted, atol=0.02)
