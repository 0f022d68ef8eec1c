"""The encoder: texts of a row are strangers, every key matters, heads and positions by literal numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, build, numbers, slow, unstacked
from tiny_encoders import DISENTANGLED, ROTARY, call, encoder, texts

from llm_jax.config import DecoderConfig, EncoderConfig
from llm_jax.config.model import check_model
from llm_jax.errors import ConfigError
from llm_jax.models import transformer
from llm_jax.models.disentangled import log_bucket
from llm_jax.models.flops import training_flops
from llm_jax.models.positions import relative_bucket

GIVEN = ("positions", "segment_ids", "token_types")
FORMS = {
    "BERT": {},
    "ModernBERT": ROTARY | dict(sliding_window=4, layer_pattern=("full", "window"), window_rope_base=50.0),
    "DeBERTa": DISENTANGLED,
    "T5": dict(positions="relative", relative_buckets=8, relative_max_distance=12, norm="rmsnorm"),
    "ELECTRA": dict(embedding_dim=12),
}


def apply(model, params, batch, method="hidden", **more):
    run = lambda params, batch: call(model, params, batch, method, **more)  # noqa: E731
    return jax.tree.map(np.asarray, jax.jit(run, compiler_options=QUICK)(params, batch))


def given(batch, *names):
    return {name: batch[name] for name in ("tokens", *names, *GIVEN)}


def alone(batch, row, text):
    """One text of a packed batch as a row of its own, and where it lies."""
    place = np.flatnonzero(batch["segment_ids"][row] == text)
    return {name: batch[name][row : row + 1, place] for name in ("tokens", "token_types")}, place


# -------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_text_is_as_if_it_were_alone(form):
    batch, model = texts(2, 16), build(encoder(head="text", head_pooling="mean", **FORMS[form]))
    params = numbers(model)
    hidden = apply(model, params, given(batch))
    labels = apply(model, params, given(batch, "starts"), "text_logits")
    means = apply(model, params, given(batch, "starts"), "embeddings")
    assert batch["segment_ids"].max() >= 3
    for text in (1, 2, 3):
        one, place = alone(batch, 0, text)
        expected = apply(model, params, one)
        np.testing.assert_allclose(hidden[0, place], expected[0], rtol=0, atol=2e-5)
        np.testing.assert_allclose(means[0, text - 1], expected[0].mean(0), rtol=0, atol=2e-5)
        start = {"starts": np.zeros((1, 1), np.int32)}
        found = apply(model, params, one | start, "text_logits")
        np.testing.assert_allclose(labels[0, text - 1], found[0, 0], rtol=0, atol=2e-5)


def test_every_token_sees_both_sides():
    model = build(encoder())
    params, tokens = numbers(model), np.arange(8, dtype=np.int32)[None]
    changed = tokens.copy()
    changed[0, 7] = 20
    a, b = apply(model, params, {"tokens": tokens}), apply(model, params, {"tokens": changed})
    assert (np.abs(a - b).max(-1) > 1e-4).all()


def test_layers_stacked_and_each_by_itself_are_the_same():
    for form in FORMS.values():
        cfg = encoder(num_layers=3, **form)
        model, single = build(cfg), build(dataclasses.replace(cfg, scan_layers=False, remat="full"))
        params, batch = numbers(model), texts(2, 16)
        a, b = apply(model, params, given(batch)), apply(single, unstacked(params, cfg), given(batch))
        real = batch["segment_ids"] > 0
        np.testing.assert_allclose(a[real], b[real], rtol=0, atol=2e-5)


# ---------------------------------------------------------------------------------------------- heads


def test_masked_losses_are_those_of_the_logits():
    batch, model = texts(2, 16), build(encoder(head="masked_pairs", vocab_multiple=32, logits_softcap=5.0))
    params = numbers(model)
    logits = apply(model, params, given(batch, "masked_positions"), "masked_logits")
    assert logits.shape == (2, 4, 32) and (logits[..., 30:] == -np.inf).all() and np.abs(logits[..., :30]).max() <= 5
    names = ("masked_positions", "masked_targets", "starts")
    loss, correct, pairs = apply(model, params, given(batch, *names), "masked_losses")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(-log_p, batch["masked_targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert (correct == (logits.argmax(-1) == batch["masked_targets"])).all() and pairs.shape == (2, 4, 2)
    without = apply(model, params, given(batch, "masked_positions", "masked_targets"), "masked_losses")
    np.testing.assert_array_equal(without[0], loss)
    assert without[2] is None


ALONE = {
    **{name: form for name, form in FORMS.items() if name != "DeBERTa"},
    "grouped": dict(num_kv_heads=2, remat="full"),
    **{placement: dict(norm_placement=placement) for placement in ("pre", "output", "sandwich", "parallel")},
}


ALWAYS = ("ModernBERT", "grouped", "T5", "parallel")


@pytest.mark.parametrize("form", [form if form in ALWAYS else slow(form) for form in ALONE])
def test_a_last_block_that_computes_what_is_read_alone(form, monkeypatch):
    """Losses, gradients and dropout's masks are those of whole rows, for less work."""
    rates = dict(embedding=0.1, attention=0.4, attention_output=0.2, mlp_output=0.2)
    model = build(encoder(head="masked_pairs", scan_layers=False, dropout=rates, **ALONE[form]))
    batch, params = texts(3, 16), numbers(model)
    read = given(batch, "masked_positions", "masked_targets", "starts")
    weights = jnp.arange(1.0, 13).reshape(3, 4)

    def run():
        def total(params, batch):
            rows = {"rows": jnp.arange(3) + 5}
            loss, _, pairs = call(model, params, batch | rows, "masked_losses", dropout_key=jax.random.key(1))
            return (loss * weights).sum() + (pairs * jnp.arange(1.0, 9).reshape(1, 4, 2)).sum()

        compiled = jax.jit(jax.value_and_grad(total)).lower(params, read).compile(compiler_options=QUICK)
        return compiled(params, read), compiled.cost_analysis()["flops"]

    found, less = run()
    monkeypatch.setattr(transformer, "reads_alone", lambda cfg: False)
    expected, more = run()
    assert less < 0.95 * more
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


def test_packed_rows_that_read_as_many_tokens_as_they_have_are_computed_whole():
    batch, model = given(texts(2, 8, places=3)), build(encoder(head="text", scan_layers=False))
    every, first = np.tile(np.arange(8, dtype=np.int32), (2, 1)), np.zeros((2, 1), np.int32)
    found = apply(model, numbers(model), batch | {"starts": every}, "text_logits")
    expected = apply(model, numbers(model), batch | {"starts": first}, "text_logits")
    np.testing.assert_allclose(found[:, :1], expected, rtol=0, atol=2e-5)


def test_a_mean_of_no_text_is_zero():
    batch, model = texts(2, 16), build(encoder(head="embedding"))
    batch["starts"][:, -1] = 15
    batch["segment_ids"][:, 15] = 0
    found = apply(model, numbers(model), given(batch, "starts"), "embeddings")
    assert (found[:, -1] == 0).all() and (found[:, 0] != 0).any()


@pytest.mark.parametrize("head_form", ["bert", "roberta"])
def test_dropout_of_the_head(head_form):
    """RoBERTa's is there before the dense layer too."""
    model = build(encoder(head="text", head_form=head_form, head_dropout=0.5))
    params = numbers(model)
    batch = given(texts(2, 16), "starts")
    plain = apply(model, params, batch, "text_logits")
    keys = [apply(model, params, batch, "text_logits", dropout_key=jax.random.key(i)) for i in (1, 1, 2)]
    np.testing.assert_array_equal(keys[0], keys[1])
    assert np.abs(keys[0] - keys[2]).max() > 1e-3 and np.abs(keys[0] - plain).max() > 1e-3


# ------------------------------------------------------------------------------------------ positions


def test_buckets_of_both_directions():
    """T5's: 8 buckets are 4 behind, of which 2 exact, and 4 ahead."""
    distance = jnp.array([0, 1, 2, 3, 5, 30, -1, -2, -3, -30])
    assert relative_bucket(distance, 8, 8, causal=False).tolist() == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7]


def test_logarithmic_buckets():
    """DeBERTa's with 8 rows: 4 is distance 0, up to 2 exact on each side, then a bucket for all farther ones."""
    distance = jnp.arange(-6, 7)
    assert log_bucket(distance, 8, 12).tolist() == [1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7]
    far = jnp.array([-500, -9, -8, -5, -4, 4, 5, 8, 9, 40, 500])
    assert log_bucket(far, 16, 20).tolist() == [0, 2, 2, 3, 4, 12, 13, 14, 14, 15, 15]


def test_training_flops_count_both_sides():
    """2 layers, 16 wide, 4 heads, MLP of 24, vocabulary 30, rows of 12; 3 layers with windows of 4."""
    model = build(encoder())
    found = training_flops(model.cfg, model.shapes(), model.axes(), 12)
    assert found.matrices == 6 * (2 * (4 * 16 * 16 + 2 * 16 * 24) + 16 * 16 + 30 * 16)
    assert found.attention == pytest.approx(12 * 2 * 16 * 12)
    windowed = build(encoder(sliding_window=4))
    visible = sum(min(t + 2, 11) - max(t - 2, 0) + 1 for t in range(12)) / 12
    found = training_flops(windowed.cfg, windowed.shapes(), windowed.axes(), 12)
    assert found.attention == pytest.approx(12 * 2 * 16 * visible)
    hidden = training_flops(model.cfg, model.shapes(), model.axes(), 12, {"masked": 2 / 12})
    assert hidden.matrices == 6 * (2 * (4 * 16 * 16 + 2 * 16 * 24) + (16 * 16 + 30 * 16) / 6)
    # of the last block keys and values of all tokens, of 3 in 12 the rest
    alone = build(encoder(head="masked_pairs", scan_layers=False))
    found = training_flops(alone.cfg, alone.shapes(), alone.axes(), 12, {"masked": 2 / 12, "pairs": 1 / 12})
    last = 2 * 16 * 16 + (2 * 16 * 16 + 2 * 16 * 24) / 4
    heads = (16 * 16 + 30 * 16) / 6 + (16 * 16 + 16 * 2) / 12
    assert found.matrices == pytest.approx(6 * (4 * 16 * 16 + 2 * 16 * 24 + last + heads))
    assert found.attention == pytest.approx(12 * (1 + 3 / 12) * 16 * 12)
    labels = build(encoder(head="token"))
    found = training_flops(labels.cfg, labels.shapes(), labels.axes(), 12)
    assert found.matrices == 6 * (2 * (4 * 16 * 16 + 2 * 16 * 24) + 16 * 2)


# ----------------------------------------------------------------------------------------------- keys

TEXT = dict(head="text")
# key: (config it is changed in, new value, "parameters" that change or "output" of the same ones)
KEYS = {
    "first_position": ({}, 2, "parameters"),
    "token_types": ({}, 3, "parameters"),
    "embedding_dim": ({}, 12, "parameters"),
    "embedding_norm": ({}, False, "parameters"),
    "head": ({}, "token", "parameters"),
    "head_form": (TEXT, "distilbert", "output"),
    "head_pooling": (TEXT, "mean", "output"),
    "head_dropout": (TEXT, 0.7, "output"),
    "num_labels": (TEXT, 3, "parameters"),
    "generator_divisor": (dict(head="replaced"), 2, "parameters"),
}
CHOICES = [
    *(("head", {}, head, "parameters") for head in ("masked_pairs", "text", "embedding", "pooled", "replaced")),
    *(("head_form", TEXT, form, "output") for form in ("electra", "deberta", "roberta")),
    ("head_form", TEXT, "modernbert", "parameters"),
    ("positions", {}, "disentangled", "parameters"),
    ("positions", {}, "sinusoidal", "parameters"),
    ("token_types", {}, 0, "parameters"),
]


def test_every_key_of_its_own_has_a_case():
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (EncoderConfig, DecoderConfig)]
    assert KEYS.keys() == names[0] - names[1]


@pytest.mark.parametrize(("key", "base", "value", "what"), [(k, *case) for k, case in KEYS.items()] + CHOICES, ids=str)
def test_a_changed_key_changes_something(key, base, value, what):
    old, new = build(encoder(**base)), build(encoder(**base | {key: value}))
    shapes = [str(jax.tree_util.tree_leaves_with_path(model.shapes())) for model in (old, new)]
    assert (shapes[0] != shapes[1]) == (what == "parameters")
    if what == "output":
        params, batch = numbers(old), given(texts(2, 16), "starts")
        found = [apply(m, params, batch, "text_logits", dropout_key=jax.random.key(1)) for m in (old, new)]
        assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(moe=dict(num_experts=4)), "model.moe.num_experts"),
        (dict(latent=dict(kv_rank=4)), "model.latent.kv_rank"),
        (dict(sliding_window=5), "half of an encoder's window"),
        (dict(num_labels=3), "model.num_labels = 3: it is read only with model.head = text or token"),
        (dict(head="token", head_pooling="mean"), "model.head_pooling"),
        (dict(head="text", tie_embeddings=False), "model.tie_embeddings"),
        (ROTARY | dict(first_position=2), "model.first_position"),
        (DISENTANGLED | dict(num_kv_heads=2), "model.num_kv_heads"),
        (DISENTANGLED | dict(relative_buckets=6), "model.relative_buckets"),
        (dict(positions="relative", relative_buckets=8, relative_max_distance=4), "relative_max_distance"),
        (dict(generator_divisor=2), "model.generator_divisor = 2: it is read only with model.head = replaced"),
        (dict(head="replaced", generator_divisor=3), "model.embed_dim = 16 does not split"),
        (dict(head="replaced", generator_divisor=2, positions="relative"), "model.positions = 'relative'"),
        (dict(head="replaced", generator_divisor=2, lora=dict(rank=2)), "a generator has no adapters"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_model(encoder(**changes))


def test_back_ends_that_cannot_are_refused():
    model = build(encoder(attention_kernel="ring", **DISENTANGLED))
    with pytest.raises(ConfigError, match="model.attention_kernel='ring' .* lacks bias"):
        jax.eval_shape(model.apply, model.shapes(), jnp.zeros((1, 8), jnp.int32))


def test_rows_that_are_too_long_are_refused():
    model = build(encoder())
    with pytest.raises(ValueError, match="longer than model.max_length=16"):
        jax.eval_shape(model.apply, model.shapes(), jnp.zeros((1, 17), jnp.int32))
