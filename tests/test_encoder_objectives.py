"""Losses of encoders against float64 loops, with scores made by hand in place of a model, and with a real one."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, assert_close, mesh_layout, numbers, slow

from llm_jax.config import DropoutConfig, EncoderConfig
from llm_jax.models import registry
from llm_jax.models.encoder import Texts
from llm_jax.objectives.labelled import LabelledObjective, similarity_losses, span_losses
from llm_jax.objectives.masked import MaskedObjective, ReplacedObjective, binary_cross_entropy, label_losses
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training.step import gradients

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def model_of(scores):
    """A model that gives these scores, whatever it is asked."""
    return SimpleNamespace(apply=lambda *args, **options: jnp.asarray(scores))


def labelled_batch(labels, there):
    labels = np.asarray(labels)
    ids = np.where(np.asarray(there), np.arange(np.asarray(there).size).reshape(np.shape(there)), -1)
    rows, length = len(ids), 6
    return {
        "tokens": np.ones((rows, length), np.int32), "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.zeros((rows, length), np.int32), "token_types": np.zeros((rows, length), np.int32),
        "starts": np.zeros(ids.shape, np.int32), "text_ids": ids.astype(np.int32), "labels": labels,
    }  # fmt: skip


def means(objective, scores, batch):
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    sums, weights = objective.sums(model_of(scores), None, batch, None), objective.weights(batch)
    assert sums.keys() == weights.keys() == objective.coefficients().keys()
    return {name: float(sums[name] / weights[name]) for name in sums}


THERE = [[True, True], [True, False]]


def test_classification():
    scores, labels = RNG.normal(size=(2, 2, 3)), np.array([[0, 2], [1, 0]], np.int32)
    got = means(LabelledObjective("classification"), scores, labelled_batch(labels, THERE))
    places = [(0, 0), (0, 1), (1, 0)]
    assert got["loss"] == pytest.approx(np.mean([-log_softmax(scores[p])[labels[p]] for p in places]), rel=1e-5)
    assert got["accuracy"] == pytest.approx(np.mean([scores[p].argmax() == labels[p] for p in places]))


def test_label_smoothing():
    loss, _ = label_losses(jnp.asarray([[1.0, 2.0, 4.0]]), jnp.array([1]), 0.3)
    log_p = log_softmax([1, 2, 4])
    assert float(loss[0]) == pytest.approx(-0.7 * log_p[1] - 0.3 * log_p.mean(), rel=1e-5)


def test_multilabel_and_regression():
    scores, labels = 3 * RNG.normal(size=(2, 2, 4)), RNG.integers(0, 2, (2, 2, 4)).astype(np.float32)
    got = means(LabelledObjective("multilabel"), scores, labelled_batch(labels, THERE))
    p = 1 / (1 + np.exp(-scores))
    losses = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(-1)
    assert got == {"loss": pytest.approx(losses[np.array(THERE)].mean(), rel=1e-5)}
    scores, labels = RNG.normal(size=(2, 2, 1)), RNG.normal(size=(2, 2, 1)).astype(np.float32)
    got = means(LabelledObjective("regression"), scores, labelled_batch(labels, THERE))
    assert got["loss"] == pytest.approx(np.square(scores - labels)[np.array(THERE)].mean(), rel=1e-5)


def test_binary_cross_entropy_is_finite_far_out():
    found = binary_cross_entropy(jnp.array([500.0, -500.0, 500.0]), jnp.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(found, [0, 0, 500])


def test_tokens_without_a_label_do_not_count():
    scores = RNG.normal(size=(2, 6, 3))
    labels = np.array([[-1, 2, -1, 0, -1, -1], [-1, 1, 1, -1, -1, -1]], np.int32)
    got = means(LabelledObjective("tokens"), scores, labelled_batch(labels, THERE))
    places = np.argwhere(labels >= 0)
    losses = [-log_softmax(scores[tuple(p)])[labels[tuple(p)]] for p in places]
    assert got["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_spans_are_told_from_their_own_text_alone():
    scores = RNG.normal(size=(1, 6, 2)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 0]], np.int32)
    labels = np.array([[[1, 2], [3, 4], [0, 0]]], np.int32)  # the last slot has no text
    loss, correct = span_losses(jnp.asarray(scores), jnp.asarray(labels), jnp.asarray(segments))
    first = (-log_softmax(scores[0, :3, 0])[1] - log_softmax(scores[0, :3, 1])[2]) / 2
    second = (-log_softmax(scores[0, 3:5, 0])[0] - log_softmax(scores[0, 3:5, 1])[1]) / 2
    np.testing.assert_allclose(loss[0, :2], [first, second], rtol=1e-5)
    assert np.isfinite(loss).all() and correct.shape == (1, 3)


def test_choices_of_a_record_stand_in_rows_apart():
    scores = RNG.normal(size=(6, 1, 1))  # texts 0, 1, 2 of two records: rows 0 1 | 2 3 | 4 5
    labels = np.array([[2], [0]] * 3, np.int32)
    got = means(LabelledObjective("choice", 3), scores, labelled_batch(labels, np.ones((6, 1), bool)))
    expected = [-log_softmax(scores[record::2, 0, 0])[label] for record, label in ((0, 2), (1, 0))]
    assert got["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("texts", [2, 3])
def test_similarity_tells_a_pair_from_all_others(texts):
    x = RNG.normal(size=(texts, 4, 5))
    there = np.array([True, True, True, False])
    loss, correct = similarity_losses(jnp.asarray(x), jnp.asarray(there), 0.1)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    columns = [(c, b) for c in range(1, texts) for b in range(3)]
    for record in range(3):
        cosines = [unit[0, record] @ unit[c, b] / 0.1 for c, b in columns]
        own = columns.index((1, record))
        assert float(loss[record]) == pytest.approx(-log_softmax(cosines)[own], rel=1e-4)
        assert bool(correct[record]) == (int(np.argmax(cosines)) == own)


def test_similarity_has_a_gradient_beside_rows_of_padding():
    grad = jax.grad(lambda x: similarity_losses(x, jnp.array([True, False]), 0.1)[0][0])(
        jnp.zeros((2, 2, 3)).at[:, 0].set(1)
    )
    assert np.isfinite(grad).all()


# -------------------------------------------------------------------------------------- with a real model


def encoder(head, **changes):
    cfg = EncoderConfig(
        vocab_size=30, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24, max_length=12, head=head, num_labels=3,
        **changes,
    )  # fmt: skip
    return lambda layout=Layout(): registry.build(cfg, layout, Precision())  # noqa: B008


def masked_batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, 12), np.int32)
    for row in range(rows):
        segments[row, : 5 + row % 3] = 1
        segments[row, 5 + row % 3 : 10] = 2
    positions = np.where(segments == 2, np.arange(12) - (segments == 1).sum(1, keepdims=True), np.arange(12)) * (
        segments > 0
    )
    weights = (rng.random((rows, 4)) < 0.7).astype(np.float32)
    return {
        "tokens": rng.integers(0, 30, (rows, 12)).astype(np.int32) * (segments > 0), "segment_ids": segments,
        "positions": positions.astype(np.int32), "token_types": (rng.random((rows, 12)) < 0.5).astype(np.int32),
        "masked_positions": rng.integers(0, 10, (rows, 4)).astype(np.int32),
        "masked_targets": rng.integers(0, 30, (rows, 4)).astype(np.int32), "masked_weights": weights,
        "starts": np.stack([np.zeros(rows, np.int32), (segments == 1).sum(1).astype(np.int32)], 1),
        "pair_labels": rng.integers(0, 2, (rows, 2)).astype(np.int32),
        "pair_weights": np.ones((rows, 2), np.float32) * (np.arange(rows) % 4 > 0)[:, None],
        "masked_draws": (rng.integers(0, 2**23, (rows, 4)) / 2**23).astype(np.float32),
        "text_ids": np.arange(2 * rows).reshape(rows, 2).astype(np.int32),
        "labels": rng.integers(0, 3, (rows, 2)).astype(np.int32),
    }  # fmt: skip


CASES = {
    "masked_pairs": MaskedObjective(), "replaced": ReplacedObjective(), "text": LabelledObjective("classification"),
}  # fmt: skip


DROPS = DropoutConfig(attention=0.3, attention_output=0.2, mlp_output=0.2)
ALONE = {  # their last block computes what is read alone: 6 places of 12, or 2
    "masked_pairs": dict(num_kv_heads=2, dropout=DROPS, scan_layers=False),
    "text": dict(positions="relative", relative_buckets=8, dropout=DROPS, scan_layers=False),
}
MESHES = [dict(data=2, fsdp=2, tensor=2), dict(data=2, fsdp=2)]
CELLS = [*((head, {}) for head in CASES), *ALONE.items()]


@pytest.mark.parametrize(
    "head, changes, mesh",
    [(head, changes, MESHES[0]) for head, changes in CELLS]
    + [slow(head, changes, MESHES[1]) for head, changes in CELLS],
    ids=str,
)
def test_a_mesh_and_micro_batches_give_the_gradient_of_one_device(head, changes, mesh):
    objective, make = CASES[head], encoder(head, **changes)
    model = make()
    params, batch = numbers(model), {name: jnp.asarray(array) for name, array in masked_batch().items()}

    def run(model, layout, accumulation):
        found = jax.jit(
            lambda params, batch: gradients(
                model, objective, params, batch, layout=layout, seed=0, step=jnp.int32(0), accumulation=accumulation
            )[:2]
        )
        return found.lower(params, batch).compile(compiler_options=QUICK)(params, batch)

    plain = run(model, Layout(), 1)
    layout = mesh_layout(**mesh)
    assert_close(run(make(layout), layout, 2), plain, rtol=1e-4, atol=1e-4)


SPLIT = {  # name: (head, objective, micro-batches, changes)
    "masked_pairs": ("masked_pairs", MaskedObjective(), 2, {}),
    "unrolled": ("masked_pairs", MaskedObjective(), 2, dict(dropout=DROPS, scan_layers=False)),
    "text": ("text", LabelledObjective("classification"), 2, {}),
    "token": ("token", LabelledObjective("tokens"), 1, {}),
    "embedding": ("embedding", LabelledObjective("similarity", texts_a_record=2), 1, {}),
    "replaced": ("replaced", ReplacedObjective(), 1, {}),
}  # fmt: skip
QUICK_ONES = ("masked_pairs", "unrolled")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK_ONES else pytest.mark.slow) for name in SPLIT]
)
def test_rows_split_over_their_tokens_give_the_gradient_of_one_device(name):
    """Four devices share a row, whose two texts and four hidden places no four devices could share. The last block then
    computes whole rows ("unrolled": where one device computes what is read alone)."""
    head, objective, accumulation, changes = SPLIT[name]
    make, batch = encoder(head, **changes), masked_batch()
    if head == "token":
        batch["labels"] = np.where(batch["segment_ids"] > 0, batch["tokens"] % 3, -1)
    params = numbers(make())

    def run(layout, accumulation):
        settings = dict(layout=layout, seed=0, step=jnp.int32(0), accumulation=accumulation)
        step = jax.jit(lambda params, batch: gradients(make(layout), objective, params, batch, **settings)[:2])
        placed = layout.put_batch(batch, len(batch["tokens"]))
        return step.lower(params, placed).compile(compiler_options=QUICK)(params, placed)

    found, expected = run(mesh_layout(fsdp=2, sequence=4), accumulation), run(Layout(), 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)


def test_a_packed_text_has_the_loss_that_it_has_alone():
    """Pairs, hidden tokens and labels of the second text of a row, and of the same text in a row of its own."""
    model = encoder("masked_pairs", dropout=EncoderConfig().dropout)()
    params, batch = numbers(model), masked_batch()
    row = 1
    size = int((batch["segment_ids"][row] == 2).sum())
    begin = int(batch["starts"][row, 1])
    alone = {"tokens": np.zeros((1, 12), np.int32), "token_types": np.zeros((1, 12), np.int32)}
    for name in alone:
        alone[name][0, :size] = batch[name][row, begin : begin + size]
    segments = (np.arange(12) < size).astype(np.int32)[None]
    positions = (np.arange(12) * segments[0]).astype(np.int32)[None]
    place = np.array([[1]], np.int32)
    target = np.array([[7]], np.int32)
    loss = jax.jit(
        lambda params, text, place, starts: model.apply(
            params, text, place, jnp.asarray(target), starts=starts, method="masked_losses"
        )
    )
    text = Texts.of({name: value[row : row + 1] for name, value in batch.items()})
    packed = loss(params, text, place + begin, np.array([[begin]], np.int32))
    text = Texts(alone["tokens"], positions, segments, alone["token_types"])
    single = loss(params, text, place, np.zeros((1, 1), np.int32))
    np.testing.assert_allclose(packed[0], single[0], rtol=2e-5)
    np.testing.assert_allclose(packed[2], single[2], rtol=2e-5, atol=1e-6)


def test_an_evaluation_adds_up_to_the_mean_over_all_places():
    model, objective = encoder("masked_pairs")(), MaskedObjective()
    params = numbers(model)
    jitted = lambda method: jax.jit(functools.partial(method, model), compiler_options=QUICK)  # noqa: E731
    found = [jitted(objective.evaluation)(params, masked_batch(seed=seed)) for seed in range(2)]
    totals = {name: sum(float(one[name]) for one in found) for name in found[0]}
    got = objective.results(totals)
    both = {name: np.concatenate([masked_batch(seed=s)[name] for s in range(2)]) for name in masked_batch()}
    sums, weights = jitted(objective.sums)(params, both), objective.weights(both)
    for name in ("loss", "accuracy", "pair_loss", "pair_accuracy"):
        assert got[name] == pytest.approx(float(sums[name] / weights[name]), rel=1e-5)
