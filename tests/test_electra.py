"""ELECTRA: a generator that fills hidden places beside the encoder that tells which tokens are not the text's own."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_finetune import labelled, pretrain
from tiny import QUICK, build, numbers, quick_compiler
from tiny_encoders import encoder, texts

import llm_jax
from llm_jax import cli
from llm_jax.convert import safetensors
from llm_jax.errors import Unproven
from llm_jax.metrics import read_jsonl
from llm_jax.models.encoder import Texts
from llm_jax.models.flops import training_flops
from llm_jax.models.generator import draw, generator_config
from llm_jax.objectives.masked import ReplacedObjective
from llm_jax.training import convert, restore

ELECTRA = dict(head="replaced", embedding_dim=8, generator_divisor=2)


def test_tokens_are_drawn_by_their_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.0, 0.25]))
    chance = jnp.array([[0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-23]])
    assert draw(jnp.tile(logits, (1, 6, 1)), chance, 4).tolist() == [[0, 0, 1, 1, 3, 3]]


def test_a_padded_id_is_never_drawn():
    logits = jnp.where(jnp.arange(64) < 50, jax.random.normal(jax.random.key(0), (1, 4096, 64)), -jnp.inf)
    chance = jnp.minimum(jnp.linspace(0, 1, 4096), 1 - 2**-23)[None]
    assert int(draw(logits, chance, 50).max()) == 49


@pytest.mark.parametrize("changes", [ELECTRA, ELECTRA | dict(scan_layers=False)], ids=["looped", "unrolled"])
def test_the_encoder_reads_what_the_generator_drew(changes, x64):
    model, batch = build(encoder(**changes), dtype="float64"), texts(3, 16)
    params, text = numbers(model), Texts.of(batch)

    def fill(tokens, values):
        tokens = tokens.copy()
        for row, place in zip(*np.nonzero(batch["masked_weights"]), strict=True):
            tokens[row, batch["masked_positions"][row, place]] = values[row, place]
        return tokens

    apply = jax.jit(
        lambda targets: model.apply(
            params,
            text,
            batch["masked_positions"],
            targets,
            batch["masked_weights"],
            batch["masked_draws"],
            method="replaced_tokens",
        )
    )
    told, replaced, (_, right) = apply(batch["masked_targets"])
    losses = [apply(np.full_like(batch["masked_targets"], token))[2][0] for token in range(30)]
    probabilities = np.exp(-np.stack(losses, -1))  # of every token, told one target at a time
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-9)
    assert (np.asarray(right) == (probabilities.argmax(-1) == batch["masked_targets"])).all()
    seen = fill(batch["tokens"], (probabilities.cumsum(-1) <= batch["masked_draws"][..., None]).sum(-1))
    assert (seen != batch["tokens"]).any()
    assert (np.asarray(replaced) == (seen != fill(batch["tokens"], batch["masked_targets"]))).all()
    expected = model.apply(params, text._replace(tokens=seen), method="replaced_logits")
    np.testing.assert_allclose(told, expected, rtol=1e-9, atol=1e-12)


def test_without_a_generator_any_token_may_be_drawn():
    model, batch = build(encoder(head="replaced")), texts(3, 16)
    batch["tokens"][:], batch["masked_targets"][:] = 7, 7
    hidden = (batch[f"masked_{name}"] for name in ("positions", "targets", "weights", "draws"))
    apply = jax.jit(functools.partial(model.apply, method="replaced_tokens"), compiler_options=QUICK)
    _, replaced, generator = apply(numbers(model), Texts.of(batch), *hidden)
    drawn = np.floor(batch["masked_draws"] * 30)
    expected = sum(((drawn != 7) & (batch["masked_weights"] > 0)).reshape(-1))  # places are all different
    assert generator is None and int(replaced.sum()) == expected > 0


def test_each_loss_trains_its_own_part_and_both_the_embeddings():
    model, batch, objective = build(encoder(**ELECTRA)), texts(3, 16), ReplacedObjective(weight=50.0)
    params = numbers(model)

    def gradient(term):
        one = lambda params: objective.sums(model, params, batch)[term]  # noqa: E731
        return jax.jit(jax.grad(one), compiler_options=QUICK)(params)

    size = lambda tree: max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))  # noqa: E731
    by_loss, by_generator = gradient("loss"), gradient("generator_loss")
    assert size(by_loss["generator"]) == 0 < size(by_loss["stack"])
    assert size(by_generator["stack"]) == size(by_generator["replaced"]) == 0 < size(by_generator["generator"])
    for tree in (by_loss, by_generator):
        assert size(tree["embedding"]) > 0 and size(tree["positions"]) > 0 and size(tree["embedding_norm"]) > 0
    assert objective.coefficients() == {"loss": 50, "accuracy": 0, "generator_loss": 1, "generator_accuracy": 0}


def test_a_generator_is_narrower_and_shares_the_embeddings():
    model = build(encoder(**ELECTRA))
    shapes = model.shapes()["generator"]
    blocks = shapes["stack"]["blocks"]
    assert blocks["attention"]["query"]["kernel"].shape == (2, 8, 8)
    assert blocks["mlp"]["up"]["kernel"].shape == (2, 8, 12)
    assert "embedding" not in shapes and "embedding_projection" not in shapes  # 8 wide, as the embeddings are
    assert shapes["masked"]["bias"].shape == (30,)
    assert "embedding_projection" in build(encoder(**ELECTRA | dict(embedding_dim=0))).shapes()["generator"]


def test_flops_are_those_of_both_models():
    shares = {"masked": 2 / 12, "pairs": 1 / 12}
    count = lambda model: training_flops(model.cfg, model.shapes(), model.axes(), 12, shares)  # noqa: E731
    whole = build(encoder(**ELECTRA))
    one = build(dataclasses.replace(whole.cfg, generator_divisor=0))
    other = build(generator_config(whole.cfg))
    assert count(whole).total == pytest.approx(count(one).total + count(other).total)


def test_a_missing_compiler_is_not_answered_by_an_estimate(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = ("--config.model.vocab_size=30522", "--topology=h100:1x8")
    assert cli.main(["plan", "--config=bert/pretrain_electra", *flags]) == 2
    said = capsys.readouterr().err
    assert "the CUDA plugin is not installed" in said and "--quick" not in said


@pytest.mark.parametrize("flag", ["--quick", "--search"])
def test_estimates_without_compiling_know_no_generator(flag, capsys):
    vocabulary = "--config.model.vocab_size=30522"
    assert cli.main(["plan", "--config=bert/pretrain_electra", vocabulary, "--topology=h100:1x8", flag]) == 2
    assert f"{flag} estimates no generator (model.generator_divisor = 4)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("electra"), "replaced", dict(next_sentence=False), **ELECTRA)


def test_a_run_tells_both_models_figures(pretrained):
    records = read_jsonl(pretrained / "metrics.jsonl")
    last = [record for record in records if "eval/loss" in record][-1]
    assert {"eval/accuracy", "eval/generator_loss", "eval/generator_accuracy"} <= last.keys()
    assert 0.2 < last["eval/loss"] < 1 and 3 < last["eval/generator_loss"] < 7
    step = next(record for record in records if "generator_loss" in record)
    assert 0.2 < step["loss"] < 1 and 3 < step["generator_loss"] < 7


def test_labels_are_trained_on_the_encoder_alone(pretrained, tmp_path):
    with quick_compiler():
        tuned = llm_jax.finetune(
            str(pretrained), labelled(16), labelled(8, seed=1), output_dir=str(tmp_path), num_train_epochs=1,
            per_device_train_batch_size=1, max_length=16, overrides=["log.trackers=", "eval.every=0"],
        )  # fmt: skip
    assert tuned.cfg.model.generator_divisor == 0 and "generator" not in restore.restore(tmp_path).params


def test_an_export_leaves_the_generator_out(pretrained, tmp_path):
    with quick_compiler():
        with pytest.raises(Unproven):
            convert.to_hub(str(pretrained), str(tmp_path / "hub"), check=False)
        with pytest.raises(Unproven):
            convert.from_hub(str(tmp_path / "hub"), str(tmp_path / "back"), check=False)
    names = safetensors.read_folder(tmp_path / "hub")
    assert "discriminator_predictions.dense.weight" in names and not any("generator" in name for name in names)
    ours, back = restore.restore(pretrained), restore.restore(tmp_path / "back")
    text = Texts(np.tile(np.arange(12), (8, 1)))  # a row a device
    one, other = (run.model.apply(run.params, text, method="replaced_logits") for run in (ours, back))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parity
def test_an_export_gives_the_logits_of_transformers(pretrained, tmp_path, capsys):
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"needs {name} (the extra `parity`)")
    with quick_compiler():
        convert.to_hub(str(pretrained), str(tmp_path / "hub"))
    assert "checked: largest difference of the logits" in capsys.readouterr().out
