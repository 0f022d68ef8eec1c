"""The decoder as a whole: every key matters, packing isolates, parameters are counted and named as promised."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, assert_close, build, decoder, numbers, packed, unstacked

from llm_jax.config import DecoderConfig, from_dict
from llm_jax.errors import ConfigError
from llm_jax.models import registry
from llm_jax.models.flops import training_flops
from llm_jax.models.positions import rotary_frequencies
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

GOLDEN = pathlib.Path(__file__).parent / "golden"

# -------------------------------------------------------------------------------- every key changes something

ROTARY = dict(rope=dict(scaling="yarn", factor=4.0, original_length=1024))
LLAMA3 = dict(rope=dict(scaling="llama3", factor=4.0, original_length=16, low_freq_factor=1.0))
LEARNED = dict(positions="learned")
RELATIVE = dict(positions="relative", relative_buckets=8, relative_max_distance=12)
EXPERTS = dict(moe=dict(num_experts=4, top_k=2))
GROUPS = dict(moe=dict(num_experts=4, top_k=2, groups=2))
LATENT = dict(latent=dict(kv_rank=8, rope_dim=2))
ADAPTERS = dict(lora=dict(rank=3))
SAVE = dict(remat="names", remat_save=("query",))

# key: (config it is changed in, new value, what changes)
#   loss: of the same parameters; frequencies: the angles that rotary positions turn by; parameters: their paths or
#   shapes; start: their first values; program: only how it is computed, to the same numbers
KEYS = {
    "vocab_size": ({}, 31, "parameters"),
    "vocab_multiple": ({}, 32, "parameters"),
    "padded_vocab_in_softmax": (dict(vocab_multiple=32), True, "loss"),
    "num_layers": ({}, 3, "parameters"),
    "embed_dim": ({}, 32, "parameters"),
    "num_heads": ({}, 2, "loss"),
    "num_kv_heads": ({}, 2, "parameters"),
    "head_dim": ({}, 6, "parameters"),
    "mlp_dim": ({}, 0, "parameters"),
    "max_length": (LEARNED, 32, "parameters"),
    "positions": ({}, "sinusoidal", "loss"),
    "rope.base": ({}, 100.0, "loss"),
    "rope.fraction": ({}, 0.5, "frequencies"),
    "rope.scaling": (ROTARY, "linear", "frequencies"),
    "rope.factor": (ROTARY, 8.0, "frequencies"),
    "rope.original_length": (ROTARY, 128, "frequencies"),
    "rope.low_freq_factor": (LLAMA3, 2.0, "frequencies"),
    "rope.high_freq_factor": (LLAMA3, 8.0, "frequencies"),
    "rope.beta_fast": (ROTARY, 5.0, "frequencies"),
    "rope.beta_slow": (ROTARY, 0.1, "frequencies"),
    "rope.truncate": (ROTARY, False, "frequencies"),
    "rope.attention_factor": (ROTARY, 0.5, "frequencies"),
    "relative_buckets": (RELATIVE, 6, "parameters"),
    "relative_max_distance": (RELATIVE, 6, "loss"),
    "norm": ({}, "layernorm", "loss"),
    "norm_eps": ({}, 0.5, "loss"),
    "norm_scale": ({}, "zero", "loss"),
    "norm_placement": ({}, "post", "parameters"),
    "activation": ({}, "geglu", "loss"),
    "bias": ({}, "qkv", "parameters"),
    "tie_embeddings": ({}, False, "parameters"),
    "embedding_scale": ({}, True, "loss"),
    "qk_norm": ({}, "head", "parameters"),
    "attention_scale": ({}, 1.0, "loss"),
    "layer_pattern": (dict(sliding_window=2), ("window", "full"), "loss"),
    "window_rope_base": (dict(sliding_window=3), 50.0, "loss"),
    "latent.kv_rank": ({}, 8, "parameters"),
    "latent.query_rank": (LATENT, 6, "parameters"),
    "latent.rope_dim": (LATENT, 6, "parameters"),
    "latent.value_dim": (LATENT, 6, "parameters"),
    "attention_softcap": ({}, 1.0, "loss"),
    "logits_softcap": ({}, 1.0, "loss"),
    "sliding_window": ({}, 2, "loss"),
    "attention_output_scale": ({}, 0.5, "loss"),
    "attention_sinks": ({}, True, "parameters"),
    "moe.num_experts": ({}, 4, "parameters"),
    "moe.top_k": (EXPERTS, 3, "loss"),
    "moe.expert_dim": (EXPERTS, 12, "parameters"),
    "moe.shared_dim": (EXPERTS, 12, "parameters"),
    "moe.dense_layers": (EXPERTS, 1, "parameters"),
    "moe.scores": (EXPERTS, "sigmoid", "loss"),
    "moe.groups": (GROUPS, 1, "loss"),
    "moe.top_groups": (GROUPS, 2, "loss"),
    "moe.scale": (EXPERTS, 2.0, "loss"),
    "moe.router_bias": (EXPERTS, True, "parameters"),
    "moe.balance_bias": (EXPERTS, True, "parameters"),
    "moe.renormalize": (EXPERTS, False, "loss"),
    "moe.capacity_factor": (EXPERTS, 0.5, "loss"),
    "lora.rank": ({}, 3, "parameters"),
    "lora.alpha": (ADAPTERS, 1.0, "loss"),
    "lora.rank_stabilized": (ADAPTERS, True, "loss"),
    "lora.targets": (ADAPTERS, ("query",), "parameters"),
    "dropout.embedding": ({}, 0.5, "loss"),
    "dropout.attention": ({}, 0.5, "loss"),
    "dropout.attention_output": ({}, 0.5, "loss"),
    "dropout.mlp_output": ({}, 0.5, "loss"),
    "init": ({}, "torch", "start"),
    "init_std": ({}, 0.5, "start"),
    "residual_init_scale": ({}, False, "start"),
    "scan_layers": ({}, False, "parameters"),
    "remat": ({}, "full", "program"),
    "remat_save": (SAVE, ("key", "mlp_up"), "program"),
    "attention_kernel": ({}, "xla", "program"),
}
CHOICES = [  # the other values of keys with several
    ("positions", {}, "none", "loss"),
    ("positions", {}, "learned", "parameters"),
    ("positions", {}, "relative", "parameters"),
    ("rope.scaling", ROTARY, "llama3", "frequencies"),
    ("activation", {}, "gelu", "parameters"),
    ("activation", dict(activation="gelu"), "gelu_tanh", "loss"),
    ("activation", dict(activation="gelu"), "relu", "loss"),
    ("bias", {}, "all", "parameters"),
    ("bias", {}, "attention", "parameters"),
    ("norm_scale", {}, "none", "parameters"),
    ("norm_placement", {}, "sandwich", "parameters"),
    ("norm_placement", {}, "output", "loss"),
    ("norm_placement", {}, "parallel", "loss"),
    ("qk_norm", dict(qk_norm="head"), "all", "parameters"),
    ("layer_pattern", {}, ("full", "full_without_positions"), "loss"),
    ("activation", {}, "clamped_swiglu", "loss"),
    ("activation", {}, "geglu_erf", "loss"),
    ("bias", dict(norm="layernorm", bias="qkv"), "all", "parameters"),
    ("remat", dict(remat="full"), "dots", "program"),
    ("remat", dict(remat="dots"), "dots_no_batch", "program"),
    ("remat", dict(remat="full", remat_save=("query",)), "names", "program"),
    ("remat_save", SAVE, ("query=host",), "program"),
]
REFUSED = {"family": "mamba", "attention_kernel": "cudnn"}  # by the config, on this machine


def changed(cfg, key, value):
    head, _, tail = key.partition(".")
    return dataclasses.replace(cfg, **{head: changed(getattr(cfg, head), tail, value) if tail else value})


def leaf_keys(cls, prefix=""):
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            yield from leaf_keys(type(default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_key_has_a_case():
    objective = {"moe.balance_loss", "moe.router_z_loss", "moe.balance_rate"}  # test_keys.py
    assert KEYS.keys() | {"family"} | objective == set(leaf_keys(DecoderConfig))


@dataclasses.dataclass(eq=False)
class Observed:
    paths: str
    loss: Callable
    gradient: Callable
    params: dict
    model: registry.Model


@functools.cache
def observe(cfg):
    """What a config decides: paths and shapes of parameters, and the loss of fixed ones."""
    model = build(cfg)
    shapes = model.shapes()
    batch = packed(2, 12)
    paths = str(jax.tree_util.tree_leaves_with_path(shapes))

    def loss(params):
        return LanguageObjective().sums(model, params, batch, jax.random.key(1) if uses_dropout(cfg) else None)["loss"]

    return Observed(paths, jax.jit(loss, compiler_options=QUICK), jax.grad(loss), numbers(model), model)


def uses_dropout(cfg):
    return any(vars(cfg.dropout).values())


@pytest.mark.parametrize(
    ("key", "base", "value", "what"),
    [(key, *case) for key, case in KEYS.items()] + CHOICES,
    ids=lambda x: str(x) if isinstance(x, (str, int, float)) else "",
)
def test_a_changed_key_changes_something(key, base, value, what):
    cfg = decoder(**base)
    old, new = observe(cfg), observe(changed(cfg, key, value))
    if what == "parameters":
        assert new.paths != old.paths
        assert jax.eval_shape(new.loss, new.params).shape == ()
        return
    assert new.paths == old.paths
    if what == "frequencies":
        (a, scale_a), (b, scale_b) = (rotary_frequencies(each.model.cfg.rope, 16) for each in (old, new))
        assert a.shape != b.shape or (a != b).any() or scale_a != scale_b
    if what == "loss":
        assert abs(float(new.loss(old.params)) / float(old.loss(old.params)) - 1) > 1e-6
    if what == "start":
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (start(old), start(new))), strict=True))
    if what == "program":
        programs = [str(jax.make_jaxpr(each.gradient)(old.params)) for each in (old, new)]
        assert programs[0] != programs[1]
        np.testing.assert_allclose(new.loss(old.params), old.loss(old.params), rtol=1e-5)


@functools.cache
def start(observed):
    return jax.jit(observed.model.init, compiler_options=QUICK)(jax.random.key(0))


def test_unknown_families_and_unfit_back_ends_are_refused():
    with pytest.raises(ConfigError, match="model.family"):
        from_dict({"model": {"family": "mamba"}})
    with pytest.raises(ConfigError, match="model.attention_kernel='cudnn' .* lacks the platform cpu"):
        model = build(decoder(attention_kernel="cudnn"))
        model.shapes()  # of parameters, which are the same with every back end
        jax.eval_shape(model.apply, model.shapes(), jnp.zeros((1, 8), jnp.int32))


# ------------------------------------------------------------------------------------------------- vocabulary


def logits_of(cfg, params, **batch):
    batch = {"tokens": np.arange(6, dtype=np.int32)[None] % 5} | batch
    model = build(cfg)
    return np.asarray(jax.jit(lambda params: model.apply(params, **batch), compiler_options=QUICK)(params))


def test_padded_ids_have_probability_zero():
    """The padding rows of the table are drawn like the others, so keeping them would take part of the softmax."""
    cfg = decoder(vocab_size=30, vocab_multiple=32)
    params = numbers(build(cfg))
    masked = logits_of(cfg, params)
    kept = logits_of(dataclasses.replace(cfg, padded_vocab_in_softmax=True), params)
    assert masked.shape == (1, 6, 32) and masked.dtype == np.float32
    assert (masked[..., 30:] == -np.inf).all() and np.isfinite(kept).all()
    np.testing.assert_array_equal(masked[..., :30], kept[..., :30])
    table = params["embedding"]["table"]
    plain = dataclasses.replace(cfg, vocab_multiple=1)
    cut = params | {"embedding": {"table": table[:30]}}
    np.testing.assert_allclose(logits_of(plain, cut), masked[..., :30], rtol=1e-5)


def test_padded_ids_get_no_gradient():
    cfg = decoder(vocab_size=30, vocab_multiple=32)
    model, batch = build(cfg), packed(2, 8)
    objective = LanguageObjective(z_loss=0.1, label_smoothing=0.1)
    loss = lambda params: sum(objective.sums(model, params, batch, None).values())  # noqa: E731
    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(numbers(model))
    table = np.asarray(gradient["embedding"]["table"])
    assert np.isfinite(table).all() and (table[:30] != 0).any(-1).all() and (table[30:] == 0).all()


def test_tied_head_is_the_table_transposed():
    tied, untied = decoder(), decoder(tie_embeddings=False)
    params = numbers(build(tied))
    table = params["embedding"]["table"]
    np.testing.assert_allclose(
        logits_of(tied, params), logits_of(untied, params | {"head": {"kernel": table.T}}), rtol=1e-5, atol=1e-6
    )
    assert "head" not in params


def test_softcapped_logits_are_bounded():
    params = jax.tree.map(lambda x: 3 * x, numbers(build(decoder())))
    plain, capped = logits_of(decoder(), params), logits_of(decoder(logits_softcap=2.0), params)
    assert np.abs(plain).max() > 2
    np.testing.assert_allclose(capped, 2 * np.tanh(plain / 2), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ counts and contract

GPT2 = dict(
    num_layers=12, embed_dim=768, num_heads=12, positions="learned", norm="layernorm", activation="gelu_tanh"
)  # fmt: skip
CHAR = dict(positions="learned", norm="layernorm", activation="gelu", vocab_size=65)


@pytest.mark.parametrize(
    ("cfg", "count", "without_positions"),
    [
        (DecoderConfig(vocab_size=50_257, bias="all", **GPT2), 124_439_808, 123_653_376),
        (DecoderConfig(vocab_size=50_257, vocab_multiple=128, **GPT2), 124_373_760, 123_587_328),
        (DecoderConfig(num_layers=6, embed_dim=384, num_heads=6, max_length=256, **CHAR), 10_745_088, 10_646_784),
        (DecoderConfig(num_layers=4, embed_dim=128, num_heads=4, max_length=64, **CHAR), 804_096, 795_904),
    ],
    ids=["GPT-2", "nanoGPT 124M", "shakespeare_char", "shakespeare_char on a CPU"],
)
def test_published_parameter_counts(cfg, count, without_positions):
    shapes = build(cfg).shapes()
    assert registry.count_parameters(shapes) == count
    assert registry.count_parameters({k: v for k, v in shapes.items() if k != "positions"}) == without_positions


def test_parameter_tree_is_the_golden_one():
    spec = importlib.util.spec_from_file_location("make_decoder_tree", GOLDEN / "make_decoder_tree.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    golden = json.loads((GOLDEN / "decoder_tree.json").read_text())
    assert golden == {name: maker.tree(cfg) for name, cfg in maker.CONFIGS.items()}, (
        "the parameter tree has changed; if that is meant, run tests/golden/make_decoder_tree.py and say so"
    )


def test_training_flops_counted_by_hand():
    """2 layers, 16 wide, 4 heads of 4 with 2 key-value heads, MLP of 24, vocabulary 30, rows of 12."""
    model = build(decoder(num_kv_heads=2))
    found = training_flops(model.cfg, model.shapes(), model.axes(), 12)
    block = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    assert found.matrices == 6 * (2 * block + 30 * 16)
    assert found.attention == 12 * 2 * 16 * sum(range(1, 13)) / 12
    windowed = training_flops(dataclasses.replace(model.cfg, sliding_window=4), model.shapes(), model.axes(), 12)
    assert windowed.attention == 12 * 2 * 16 * (1 + 2 + 3 + 9 * 4) / 12
    assert windowed.total == windowed.matrices + windowed.attention
    latent = build(decoder(latent=dict(kv_rank=6, query_rank=5, rope_dim=2, value_dim=3)))  # queries 4 + 2, values 3
    found = training_flops(latent.cfg, latent.shapes(), latent.axes(), 12)
    block = 16 * 5 + 5 * 4 * 6 + 16 * (6 + 2) + 6 * 4 * (4 + 3) + 4 * 3 * 16 + 3 * 16 * 24
    attention = 6 * 2 * 4 * (6 + 3) * sum(range(1, 13)) / 12
    assert (found.matrices, found.attention) == (6 * (2 * block + 30 * 16), attention)
    sizes = dict(num_experts=4, top_k=2, expert_dim=8, shared_dim=5, dense_layers=1)
    moe = build(decoder(moe=dict(**sizes, balance_bias=True)))
    experts = training_flops(moe.cfg, moe.shapes(), moe.axes(), 12).matrices
    assert experts == 6 * (2 * 4 * 16 * 16 + 3 * 16 * 24 + 16 * 4 + 3 * 16 * (2 * 8 + 5) + 30 * 16)  # two of four
    found = training_flops(model.cfg, model.shapes(), model.axes(), 12)
    everything = build(decoder(num_kv_heads=2, tie_embeddings=False, bias="all", positions="learned", qk_norm="head"))
    untied = training_flops(everything.cfg, everything.shapes(), everything.axes(), 12)
    assert untied.matrices == found.matrices  # tables are looked up, vectors are not products


# --------------------------------------------------------------------------------------------- layers and remat


def value_and_gradient(cfg, params, batch):
    model = build(cfg)

    def loss(params):
        sums = LanguageObjective().sums(model, params, batch, jax.random.key(1) if uses_dropout(cfg) else None)
        return sums["loss"]

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


def test_scanned_and_unrolled_layers_are_the_same():
    cfg = decoder(num_layers=3, bias="all", norm="layernorm")
    params, batch = numbers(build(cfg)), packed(2, 8)
    value, gradient = value_and_gradient(cfg, params, batch)
    assert_all_used(gradient)
    value2, gradient2 = value_and_gradient(dataclasses.replace(cfg, scan_layers=False), unstacked(params, cfg), batch)
    np.testing.assert_allclose(value, value2, rtol=1e-6)
    assert_close(unstacked(gradient, cfg), gradient2, atol=2e-6)


def assert_all_used(gradient):
    """No parameter is left out of the loss. A bias on keys shifts all of a query's scores alike: its gradient is 0."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        if "key'" not in jax.tree_util.keystr(path) or "bias" not in jax.tree_util.keystr(path):
            assert (np.asarray(leaf) != 0).any(), path


def test_every_parameter_is_used():
    cfg = decoder(
        positions="relative", relative_buckets=6, relative_max_distance=8, qk_norm="head", tie_embeddings=False,
        bias="qkv", norm_placement="post", activation="gelu_tanh", num_kv_heads=2,
    )  # fmt: skip
    assert_all_used(value_and_gradient(cfg, numbers(build(cfg)), packed(2, 12))[1])


@pytest.mark.parametrize("scan", [True, False])
def test_remat_gives_the_same_gradient(scan):
    cfg = decoder(scan_layers=scan, dropout=dict(attention=0.2, mlp_output=0.2))
    params, batch = numbers(build(cfg)), packed(2, 8)
    value, gradient = value_and_gradient(cfg, params, batch)
    for remat in ("full", "dots", "dots_no_batch") if scan else ("full",):
        value2, gradient2 = value_and_gradient(dataclasses.replace(cfg, remat=remat), params, batch)
        np.testing.assert_allclose(value2, value, rtol=1e-6)
        assert_close(gradient2, gradient, atol=2e-6)


def test_layers_draw_their_own_dropout():
    """Two layers that each add dropout(1): a number is 0, 2 or 4. With one mask for both it would be 0 or 4."""
    model = build(decoder(vocab_size=16, tie_embeddings=False, bias="all", dropout=dict(mlp_output=0.5)))
    params = jax.tree.map(np.zeros_like, numbers(model))
    params["stack"]["blocks"]["mlp"]["down"]["bias"] += 1
    params["final_norm"]["scale"] += 1
    params["head"]["kernel"] += np.eye(16, dtype=np.float32)
    run = jax.jit(lambda p, key: model.apply(p, np.zeros((1, 8), np.int32), dropout_key=key), compiler_options=QUICK)
    logits = run(params, jax.random.key(0))
    assert {len(np.unique(place)) for place in np.asarray(logits)[0]} == {3}


# ------------------------------------------------------------------------------------------------------ packing

LENGTHS = (5, 7, 3)  # documents of one row of 16; the last place is padding


def one_row():
    rng = np.random.default_rng(7)
    documents = [rng.integers(0, 30, size).astype(np.int32) for size in LENGTHS]
    pad = 16 - sum(LENGTHS)
    return documents, {
        "tokens": np.concatenate([*documents, np.full(pad, 9)])[None].astype(np.int32),
        "positions": np.concatenate([*map(np.arange, LENGTHS), np.zeros(pad)])[None].astype(np.int32),
        "segment_ids": np.concatenate([np.repeat([1, 2, 3], LENGTHS), np.zeros(pad)])[None].astype(np.int32),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(positions="learned"),
        dict(positions="sinusoidal"),
        dict(positions="relative"),
        dict(positions="none", sliding_window=3, num_kv_heads=2),
        dict(attention_kernel="xla"),
    ],
    ids=str,
)
def test_packed_logits_are_those_of_each_document_alone(changes):
    cfg = decoder(**changes)
    model = build(cfg)
    params = numbers(model)
    documents, row = one_row()
    together = logits_of(cfg, params, **row)[0]
    alone = jax.jit(lambda params, tokens: model.apply(params, tokens), compiler_options=QUICK)
    start = 0
    for document in documents:
        # padded behind to one length: a causal model cannot see it, and one program serves all
        padded = np.pad(document, (0, 8 - len(document)))[None]
        expected = np.asarray(alone(params, padded))[0, : len(document)]
        np.testing.assert_allclose(together[start : start + len(document)], expected, rtol=0, atol=1e-5)
        start += len(document)
    assert np.isfinite(together).all()


def test_packed_loss_is_the_mean_over_all_tokens():
    """Not the mean of the documents' means."""
    model = build(decoder())
    params, (documents, row) = numbers(model), one_row()
    weights = (row["segment_ids"] != 0).astype(np.float32)
    weights[0, 1] = 0
    targets = np.roll(row["tokens"], -1, axis=1)
    sums = jax.jit(lambda batch: LanguageObjective().sums(model, params, batch, None), compiler_options=QUICK)
    packed_loss = sums(row | {"targets": targets, "loss_weights": weights})["loss"] / weights.sum()

    total, start = 0.0, 0
    for document in documents:
        end = start + len(document)
        padding = 16 - len(document)
        alone = {
            "tokens": np.pad(document, (0, padding))[None],
            "positions": np.arange(16)[None],
            "segment_ids": np.pad(np.ones(len(document), np.int32), (0, padding))[None],
            "targets": np.pad(targets[0, start:end], (0, padding))[None],
            "loss_weights": np.pad(weights[0, start:end], (0, padding))[None],
        }
        total += float(sums(alone)["loss"])
        start = end
    np.testing.assert_allclose(packed_loss, total / weights.sum(), rtol=1e-5)


def test_documents_in_a_row_have_no_influence_on_each_other():
    """The gradient of one document's loss with respect to the others' embeddings is exactly 0."""
    model = build(decoder(tie_embeddings=False))
    params, (_, row) = numbers(model), one_row()
    row["tokens"] = np.arange(16, dtype=np.int32)[None]  # each place its own row of the table

    def loss(params, which):
        logits = model.apply(params, **row)
        return jnp.where((row["segment_ids"] == which)[..., None], logits, 0).sum()

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)
    for which, own in ((1, range(5)), (2, range(5, 12)), (3, range(12, 15))):
        table = np.asarray(gradient(params, which)["embedding"]["table"])
        assert (table[list(own)] != 0).any(-1).all()
        assert (np.delete(table, list(own), axis=0) == 0).all()


# -------------------------------------------------------------------------------------------------- precision


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    cfg = decoder()
    model = registry.build(cfg, Layout(), Precision(jnp.dtype("float32"), jnp.dtype("bfloat16")))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.shapes()))
    params = numbers(model)
    logits = jax.jit(lambda params: model.apply(params, np.arange(6)[None]), compiler_options=QUICK)(params)
    assert logits.dtype == jnp.float32
    expected = logits_of(cfg, params, tokens=np.arange(6)[None])
    assert 1e-4 < np.abs(logits - expected).max() < 0.1
