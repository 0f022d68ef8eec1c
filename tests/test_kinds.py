"""Layers of several kinds: which layer is which and in which stack, the loop over them, and what each kind computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, assert_close, build, decoder, numbers, packed, slow, unstacked
from tiny_encoders import ROTARY, encoder

from llm_jax.config import check, from_dict
from llm_jax.config.kinds import LayerKind, layer_kinds, periods, places, segments
from llm_jax.errors import ConfigError
from llm_jax.models.loop import over_layers
from llm_jax.objectives.language import LanguageObjective

FULL, WINDOW, ORDERLESS = LayerKind(), LayerKind(window=True), LayerKind(positions=False)
PATTERN = ("window", "full_without_positions", "full")
# Every norm placement with a pattern that five layers do not fill.
MIXED = dict(num_layers=5, layer_pattern=PATTERN, sliding_window=3, window_rope_base=70.0, qk_norm="head")


def test_the_pattern_repeats_over_the_layers():
    assert layer_kinds(decoder(num_layers=5, layer_pattern=PATTERN, sliding_window=3)) == (
        WINDOW, ORDERLESS, FULL, WINDOW, ORDERLESS,
    )  # fmt: skip
    assert layer_kinds(decoder()) == (FULL, FULL)
    assert layer_kinds(decoder(sliding_window=3)) == (WINDOW, WINDOW)


def test_periods():
    for words, found in (
        ("aaaa", [1, 2, 3, 4]), ("abab", [2, 4]), ("ababa", [2, 4, 5]), ("aab", [3]), ("aabaaba", [3, 6, 7]),
        ("abcb", [4]), ("aba", [2, 3]), ("a", [1]),
    ):  # fmt: skip
        assert periods(words) == found, words


GEMMA_3 = dict(layer_pattern=("window",) * 5 + ("full",), sliding_window=3)
EXPERTS = dict(num_experts=4, dense_layers=1)
# name: config, and the layers of each stack
STACKS = {
    "alike": (decoder(num_layers=5), dict(blocks=5)),
    "one period": (decoder(num_layers=3, layer_pattern=PATTERN, sliding_window=3), dict(blocks=3)),
    "Gemma 3 1B": (decoder(num_layers=26, **GEMMA_3), dict(blocks=24, last_blocks=2)),
    "Gemma 3 4B": (decoder(num_layers=34, **GEMMA_3), dict(blocks=30, last_blocks=4)),
    "Gemma 3 12B": (decoder(num_layers=48, **GEMMA_3), dict(blocks=48)),
    "a pattern of one kind": (decoder(num_layers=3, layer_pattern=("full", "full")), dict(blocks=3)),
    "a dense layer first": (decoder(num_layers=5, moe=EXPERTS), dict(first_blocks=1, blocks=4)),
    "all three": (
        decoder(num_layers=6, moe=EXPERTS, layer_pattern=("window", "full"), sliding_window=3),
        dict(first_blocks=1, blocks=4, last_blocks=1),
    ),
    "ModernBERT": (
        encoder(num_layers=6, **ROTARY, layer_pattern=("full", "window", "window"), sliding_window=4),
        dict(first_blocks=1, blocks=3, last_blocks=2),
    ),
    "an encoder of one layer": (encoder(num_layers=1, **ROTARY), dict(first_blocks=1)),
}


@pytest.mark.parametrize("name", STACKS)
def test_the_stacks_of_a_model(name):
    """Every layer is in one of them, in order, with its kind; and the parameters lie so."""
    cfg, counts = STACKS[name]
    found = segments(cfg)
    assert {segment.name: len(segment.kinds) for segment in found} == counts
    assert sum((segment.kinds for segment in found), ()) == layer_kinds(cfg)
    assert places(cfg) == [(name, (i,)) for name, count in counts.items() for i in range(count)]
    assert [places(cfg)[segment.first] for segment in found] == [(segment.name, (0,)) for segment in found]
    model = build(cfg)
    shapes, axes = model.shapes()["stack"], model.axes()["stack"]
    assert {name: {leaf.shape[0] for leaf in jax.tree.leaves(shapes[name])} for name in shapes} == {
        name: {count} for name, count in counts.items()
    }
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    assert {leaf[0] for leaf in jax.tree.leaves(axes, is_leaf=is_axes)} == {segment.axis for segment in found}
    alone = dataclasses.replace(cfg, scan_layers=False)
    assert places(alone) == [(f"block_{i}", ()) for i in range(cfg.num_layers)]
    assert sorted(build(alone).shapes()["stack"]) == sorted(name for name, _ in places(alone))


# ------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(("words", "period"), [("aaaaa", 1), ("ababab", 2), ("aabaab", 3), ("aba", 3), ("abcde", 5)])
def test_the_loop_over_layers_is_a_plain_loop(words, period):
    """Whole numbers, so both are equal; and no more layers are traced than a period has."""
    traced = []

    def layer(kind, carry, own):
        traced.append(kind)
        carry = 3 * carry + "abcde".index(kind) * own["a"] + own["b"].sum()
        return carry, {"seen": carry, "own": own["b"] * 2}

    of_layers = {"a": np.arange(len(words)) + 1, "b": np.arange(2 * len(words)).reshape(-1, 2)}
    carry, found = jax.jit(lambda carry: over_layers(layer, words, carry, of_layers))(jnp.int32(7))
    assert len(traced) <= 2 * period  # a scan traces its body twice

    expected, plain = 7, []
    for i, kind in enumerate(words):
        expected, one = layer(kind, expected, {"a": of_layers["a"][i], "b": of_layers["b"][i]})
        plain.append(one)
    assert int(carry) == expected
    np.testing.assert_array_equal(found["seen"], [one["seen"] for one in plain])
    np.testing.assert_array_equal(found["own"], [one["own"] for one in plain])


@pytest.mark.parametrize(
    "keys",
    [*(dict(norm_placement=placement) for placement in ("pre", "post")),
     *(slow(dict(norm_placement=placement)) for placement in ("sandwich", "output", "parallel")),
     dict(lora=dict(rank=2)), dict(moe=EXPERTS, num_layers=6)],
    ids=str,
)  # fmt: skip
def test_scanned_layers_are_those_applied_one_by_one(x64, keys):
    """Logits and gradients, with packed rows."""
    cfg = decoder(**MIXED | keys)
    params, batch = numbers(build(cfg, dtype="float64")), packed(3, 12)
    value, gradient = value_and_gradient(cfg, params, batch)
    single = dataclasses.replace(cfg, scan_layers=False)
    alone, gradient_alone = value_and_gradient(single, unstacked(params, cfg), batch)
    np.testing.assert_allclose(value, alone, rtol=1e-12)
    assert_close(unstacked(gradient, cfg), gradient_alone, atol=1e-10)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_no_gradient(x64, scan):
    cfg = decoder(scan_layers=scan, **MIXED)
    params, batch = numbers(build(cfg, dtype="float64")), packed(2, 8)
    expected = value_and_gradient(cfg, params, batch)
    for changes in (dict(remat="full"), dict(remat="names", remat_save=("query",))):
        found = value_and_gradient(dataclasses.replace(cfg, **changes), params, batch)
        assert_close(found, expected, atol=1e-12)


def value_and_gradient(cfg, params, batch):
    model = build(cfg, dtype="float64")
    loss = lambda params: LanguageObjective().sums(model, params, batch, None)["loss"]  # noqa: E731
    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


def test_layers_that_fill_no_period_cost_no_copy_of_the_parameters():
    """Nine layers of two kinds: what a forward pass needs besides its arguments is less than half of those."""
    cfg = decoder(num_layers=9, layer_pattern=("window", "full"), sliding_window=3, embed_dim=64, mlp_dim=256)
    model, tokens = build(cfg), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    compiled = jax.jit(model.apply).lower(model.shapes(), tokens).compile().memory_analysis()
    assert compiled.temp_size_in_bytes < compiled.argument_size_in_bytes / 2


@pytest.mark.parametrize("scan", [True, False])
def test_decoding_with_a_cache_gives_the_logits_of_whole_rows(x64, scan):
    """A prompt of 4 tokens, then one at a time to three times the window; rows of two lengths."""
    cfg = decoder(scan_layers=scan, attention_softcap=2.0, norm_placement="sandwich", **MIXED)
    model = build(cfg, dtype="float64")
    params = numbers(model)
    tokens = np.random.default_rng(5).integers(0, 30, (2, 10)).astype(np.int32)
    whole = jax.jit(model.apply, compiler_options=QUICK)(params, tokens)
    step = jax.jit(model.apply_cached, static_argnums=4, compiler_options=QUICK)
    starts = np.array([[0], [0]])
    found, cache = step(params, {}, tokens[:, :4], starts + np.arange(4), 12)
    logits = [found]
    for place in range(4, 10):
        found, cache = step(params, cache, tokens[:, place : place + 1], starts + place, 12)
        logits.append(found)
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, rtol=1e-9, atol=1e-11)


# ----------------------------------------------------------------------------------------------- each kind


def logits(tokens, cfg, params):
    return jax.jit(build(cfg, dtype="float64").apply, compiler_options=QUICK)(params, tokens)


def test_windows_and_full_layers_see_what_they_should(x64):
    """The last token of 12 depends on the first through a full layer; through two windows of 3 on the last 5 alone."""
    tokens = np.arange(12, dtype=np.int32)[None]
    sizes = dict(num_layers=2, sliding_window=3)
    for pattern, seen in ((("window",), 5), (("full", "window"), 12), (("window", "full"), 12)):
        cfg = decoder(layer_pattern=pattern, **sizes)
        params = numbers(build(cfg, dtype="float64"))
        rows = np.where(np.eye(13, 12, dtype=bool), 29, tokens)  # row i has another token i, the last one is as it was
        last = np.asarray(logits(rows, cfg, params))[:, -1]
        depends = (last[:12] != last[12]).any(-1).tolist()
        assert sum(depends) == seen and depends == sorted(depends), pattern


def test_windowed_layers_rotate_by_their_own_base_unscaled(x64):
    """With a window as long as the row they are those of a model that has that base everywhere."""
    tokens = np.random.default_rng(2).integers(0, 30, (2, 12)).astype(np.int32)
    scaled = dict(base=1e4, scaling="linear", factor=4.0)
    cfg = decoder(num_layers=2, layer_pattern=("window", "full"), sliding_window=12, window_rope_base=50.0, rope=scaled)
    params = numbers(build(cfg, dtype="float64"))
    window_first = logits(tokens, dataclasses.replace(cfg, layer_pattern=("window",)), params)
    alike = decoder(num_layers=2, rope=dict(base=50.0))
    np.testing.assert_allclose(window_first, logits(tokens, alike, params), rtol=1e-11, atol=1e-12)
    mixed = logits(tokens, cfg, params)
    assert np.abs(mixed - window_first).max() > 1e-3
    all_full = logits(tokens, decoder(num_layers=2, rope=scaled), params)
    assert np.abs(mixed - all_full).max() > 1e-3


def test_layers_without_positions_know_no_distances(x64):
    """Tokens told to stand twice as far apart give the same logits, as they do not in layers that rotate."""
    tokens, places = np.arange(8, dtype=np.int32)[None], np.arange(8, dtype=np.int32)[None]
    for pattern, same in ((("full_without_positions",), True), (("full", "full_without_positions"), False)):
        cfg = decoder(num_layers=2, layer_pattern=pattern)
        model = build(cfg, dtype="float64")
        params = numbers(model)
        apart = np.abs(model.apply(params, tokens, 2 * places) - model.apply(params, tokens, places)).max()
        assert (apart < 1e-12) == same, (pattern, apart)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(layer_pattern=["windows"]), "model.layer_pattern = 'windows'.*did you mean window"),
        (dict(layer_pattern=["window"]), "model.sliding_window is 0, so there is no window"),
        (dict(layer_pattern=["full"], sliding_window=4), "no layer of model.layer_pattern has the window"),
        (dict(layer_pattern=["window"] * 3, sliding_window=4, num_layers=2), "layers do not reach its end"),
        (dict(layer_pattern=["full_without_positions"], positions="learned"), "set model.positions=rotary"),
        (dict(window_rope_base=10.0), "no layer has both a window and rotary positions"),
    ],
    ids=str,
)
def test_patterns_that_cannot_be_followed_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        check(from_dict({"model": keys, "train": {"steps": 1}}))
