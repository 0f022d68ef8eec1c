"""Losses and gradients of pre-training and fine-tuning against transformers: the same weights, the same batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK

from llm_jax.config import CheckpointConfig, Config, DataConfig, MaskingConfig
from llm_jax.models import registry
from llm_jax.objectives import registry as objectives
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import pretrained
from llm_jax.training.step import gradients

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `parity`)")

CONFIG = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
ROWS, LENGTH, PREDICTIONS = 6, 20, 4


def saved(cls, folder, **more):
    """A random model of theirs, written to a folder; its norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    model = getattr(transformers, cls)(transformers.BertConfig(**CONFIG, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


def ours(folder, data):
    cfg = pretrained.adopt(Config(data=data, checkpoint=CheckpointConfig(init_from=f"hf:{folder}")))
    model = registry.build(cfg.model, Layout(), Precision())
    params, how = pretrained.start_from(f"hf:{folder}", model.init(jax.random.key(0)), cfg)
    assert "fresh" not in how
    return cfg, model, params


def batch(rng):
    lengths = rng.integers(10, LENGTH + 1, ROWS)
    real = np.arange(LENGTH) < lengths[:, None]
    places = np.stack([rng.choice(10, PREDICTIONS, replace=False) for _ in range(ROWS)])
    return {
        "tokens": rng.integers(1, 61, (ROWS, LENGTH)) * real,  # torch gives the padding token no gradient
        "segment_ids": real, "positions": np.arange(LENGTH) * real,
        "token_types": (np.arange(LENGTH) > 6) * real, "masked_positions": places,
        "masked_targets": rng.integers(0, 61, (ROWS, PREDICTIONS)),
        "masked_weights": (rng.random((ROWS, PREDICTIONS)) < 0.7).astype(np.float32),
        "starts": np.zeros((ROWS, 1)), "pair_labels": rng.integers(0, 2, (ROWS, 1)),
        "pair_weights": np.ones((ROWS, 1), np.float32), "text_ids": np.arange(ROWS)[:, None],
        "labels": rng.integers(0, 3, (ROWS, 1)),
    }  # fmt: skip


def on_device(features):
    return {n: jnp.asarray(a, jnp.float32 if a.dtype == np.float32 else jnp.int32) for n, a in features.items()}


def for_torch(features):
    tensor = lambda array: torch.tensor(np.asarray(array).astype(np.int64))  # noqa: E731
    return dict(
        input_ids=tensor(features["tokens"]), attention_mask=tensor(features["segment_ids"]),
        token_type_ids=tensor(features["token_types"]),
    )  # fmt: skip


def loss_and_gradient(cfg, model, params, features):
    run = jax.jit(
        lambda params, batch: gradients(
            model, objectives.make(cfg), params, batch, layout=Layout(), seed=0, step=jnp.int32(0)
        )[:2]
    )
    return run.lower(params, on_device(features)).compile(compiler_options=QUICK)(params, on_device(features))


def test_pretraining_losses_are_theirs(tmp_path):
    theirs = saved("BertForPreTraining", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    cfg, model, params = ours(tmp_path, DataConfig(task="masked", eos="lines", masking=MaskingConfig()))
    assert cfg.model.head == "masked_pairs"
    features = batch(np.random.default_rng(1))
    labels = np.full((ROWS, LENGTH), -100)
    row, slot = np.nonzero(features["masked_weights"])
    labels[row, features["masked_positions"][row, slot]] = features["masked_targets"][row, slot]
    found = theirs(
        **for_torch(features), labels=torch.tensor(labels),
        next_sentence_label=torch.tensor(features["pair_labels"][:, 0].astype(np.int64)),
    )  # fmt: skip
    found.loss.backward()
    grads, terms = loss_and_gradient(cfg, model, params, features)
    total = float(terms["loss"] + terms["pair_loss"])
    assert total == pytest.approx(found.loss.item(), rel=1e-5)
    right = (found.prediction_logits.argmax(-1).numpy() == labels)[labels >= 0].mean()
    assert float(terms["accuracy"]) == pytest.approx(right)
    np.testing.assert_allclose(
        grads["pairs"]["classifier"]["linear"]["kernel"], theirs.cls.seq_relationship.weight.grad.numpy().T, atol=1e-5
    )
    np.testing.assert_allclose(
        grads["embedding"]["table"], theirs.bert.embeddings.word_embeddings.weight.grad.numpy(), atol=2e-5
    )


def test_classification_losses_are_theirs(tmp_path):
    theirs = saved("BertForSequenceClassification", tmp_path, num_labels=3)
    (tmp_path / "tokenizer.json").write_text("{}")
    cfg, model, params = ours(tmp_path, DataConfig(task="classification"))
    assert cfg.model.num_labels == 3
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, head_dropout=0.0))
    model = registry.build(cfg.model, Layout(), Precision())
    features = batch(np.random.default_rng(2))
    found = theirs(**for_torch(features), labels=torch.tensor(features["labels"][:, 0]))
    found.loss.backward()
    grads, terms = loss_and_gradient(cfg, model, params, features)
    assert float(terms["loss"]) == pytest.approx(found.loss.item(), rel=1e-5)
    np.testing.assert_allclose(
        grads["embedding"]["table"], theirs.bert.embeddings.word_embeddings.weight.grad.numpy(), atol=2e-5
    )


def test_a_head_for_other_labels_starts_fresh(tmp_path):
    saved("BertForSequenceClassification", tmp_path, num_labels=3)
    (tmp_path / "tokenizer.json").write_text("{}")
    cfg = pretrained.adopt(
        Config(data=DataConfig(task="classification"), checkpoint=CheckpointConfig(init_from=f"hf:{tmp_path}"))
    )
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_labels=5))
    model = registry.build(cfg.model, Layout(), Precision())
    fresh = model.init(jax.random.key(0))
    params, how = pretrained.start_from(f"hf:{tmp_path}", fresh, cfg)
    assert "fresh: labels/classifier/linear/bias, labels/classifier/linear/kernel" in how
    assert "not taken over: classifier.weight, classifier.bias" in how
    assert params["labels"]["classifier"]["linear"]["kernel"] is fresh["labels"]["classifier"]["linear"]["kernel"]
    assert not (params["labels"]["pooler"]["linear"]["kernel"] == fresh["labels"]["pooler"]["linear"]["kernel"]).all()
