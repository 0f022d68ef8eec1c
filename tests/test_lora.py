"""Adapters: a layer with one against its merged kernel, what trains, where a run with them starts, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, assert_close, assert_same_bits, build, decoder, mesh_layout, numbers, packed
from tiny_encoders import DISENTANGLED, encoder, texts

from llm_jax.config import CheckpointConfig, LoraConfig, OptimConfig, load
from llm_jax.config.model import check_model
from llm_jax.errors import ConfigError, UserError
from llm_jax.models import lora, registry
from llm_jax.models.encoder import Texts
from llm_jax.models.flops import training_flops
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import checkpoint, optim, starts, step
from llm_jax.training import state as train_state
from llm_jax.training.arrays import by_path, nested

RANK = dict(rank=3, alpha=6.0)


def gradients(model, params, batch, layout=None, accumulation=1):
    layout, objective = layout or Layout(), LanguageObjective()
    found = jax.jit(
        lambda params: step.gradients(
            model, objective, params, batch, layout=layout, seed=0, step=0, accumulation=accumulation
        )[0]
    )
    return by_path(found.lower(params).compile(compiler_options=QUICK)(params))


def test_a_layer_is_x_w_plus_s_x_a_b(x64):
    model = build(decoder(lora=RANK | dict(targets=("query",)), scan_layers=False), dtype="float64")
    params = numbers(model)
    query = params["stack"]["block_1"]["attention"]["query"]
    assert {name: leaf.shape for name, leaf in query.items()} == {
        "kernel": (16, 16), "lora_a": (16, 3), "lora_b": (3, 16)
    }  # fmt: skip
    without = dataclasses.replace(model.cfg, lora=LoraConfig())
    leaves = by_path(params)
    for block in ("block_0", "block_1"):
        place = f"stack/{block}/attention/query"
        a, b = leaves.pop(f"{place}/lora_a"), leaves.pop(f"{place}/lora_b")
        leaves[f"{place}/kernel"] = leaves[f"{place}/kernel"] + 6.0 / 3 * (a @ b)
    tokens = packed(2, 8)["tokens"]
    logits = lambda model, params: jax.jit(model.apply, compiler_options=QUICK)(params, tokens)  # noqa: E731
    expected = logits(build(without, dtype="float64"), nested(leaves))
    np.testing.assert_allclose(logits(model, params), expected, rtol=1e-12)
    stabilized = LoraConfig(rank=4, alpha=6.0, rank_stabilized=True)
    assert stabilized.scale == 3.0


def test_a_and_b_start_as_published():
    model = build(decoder(embed_dim=64, num_heads=4, lora=dict(rank=5)), dtype="bfloat16")
    leaves = by_path(jax.jit(model.init, compiler_options=QUICK)(jax.random.key(0)))
    a, b = leaves["stack/blocks/mlp/down/lora_a"], leaves["stack/blocks/mlp/down/lora_b"]
    assert a.dtype == b.dtype == jnp.float32 and leaves["stack/blocks/mlp/down/kernel"].dtype == jnp.bfloat16
    assert a.shape == (2, 24, 5) and not b.any()
    bound = 1 / np.sqrt(24)
    assert 0.9 * bound < np.abs(a).max() <= bound and abs(float(a.mean())) < 0.2 * bound
    assert not np.array_equal(a[0], a[1])
    axes = model.axes()["stack"]["blocks"]["mlp"]["down"]
    assert axes["lora_a"] == ("layers", "mlp", "adapter") and axes["lora_b"] == ("layers", "adapter", "embed")


FORMS = {
    "scanned": {},
    "unrolled": dict(scan_layers=False),
    "rematerialised": dict(remat="full"),
    "gpt2": dict(bias="all", norm="layernorm", activation="gelu", positions="learned"),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_merged_model(form, x64):
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW'; all other gradients are the merged model's."""
    model = build(decoder(lora=RANK, **FORMS[form]), dtype="float64")
    params, batch = numbers(model), packed(2, 8)
    merged = build(dataclasses.replace(model.cfg, lora=LoraConfig()), dtype="float64")
    expected = gradients(merged, nested(lora.merge(by_path(params), model.cfg.lora)), batch)
    found, leaves = gradients(model, params, batch), by_path(params)
    checked = 0
    for path in leaves:
        layer, _, name = path.rpartition("/")
        if name not in ("lora_a", "lora_b"):
            continue
        d_kernel, a, b = expected[f"{layer}/kernel"], leaves[f"{layer}/lora_a"], leaves[f"{layer}/lora_b"]
        wanted = d_kernel @ b.swapaxes(-1, -2) if name == "lora_a" else a.swapaxes(-1, -2) @ d_kernel
        np.testing.assert_allclose(found[path], 2.0 * wanted, rtol=1e-9, atol=1e-12, err_msg=path)
        checked += 1
    assert checked >= 2 * 7 or form == "gpt2"


@pytest.mark.parametrize(
    "mesh", [dict(fsdp=2, tensor=2, data=2), dict(stage=2, stage_microbatches=2, fsdp=2)], ids=["fsdp", "stages"]
)
def test_every_mesh_and_accumulation_gives_the_same_gradients(mesh, x64):
    cfg, batch = decoder(lora=RANK), packed(8, 8)
    plain = build(cfg, dtype="float64")
    params = numbers(plain)
    expected = gradients(plain, params, batch)
    layout = mesh_layout(**mesh)
    split = build(cfg, layout, dtype="float64")
    placed = jax.device_put(params, layout.parameter_shardings(split.shapes(), split.axes()))
    found = gradients(split, placed, layout.put_batch(batch, 8), layout, accumulation=2)
    assert_close(found, expected, atol=1e-10)


def test_only_adapters_train_and_have_state():
    model = build(decoder(lora=RANK | dict(targets=("query|value",))))
    shapes, axes = model.shapes(), model.axes()
    cfg = OptimConfig(learning_rate=0.1, schedule="constant")
    tx = optim.make(cfg, 10, shapes, axes)
    params = numbers(model)
    state = tx.init(params)
    sizes = {leaf.size for leaf in jax.tree.leaves(state)} - {1}
    assert sizes == {2 * 16 * 3}
    changes, _ = tx.update(params, state, params)
    changed = {path for path, change in by_path(changes).items() if np.any(change)}
    assert changed == {
        f"stack/blocks/attention/{name}/{part}" for name in ("query", "value") for part in ("lora_a", "lora_b")
    }
    frozen = dataclasses.replace(cfg, freeze=(".*/lora_a",))
    trained = {path for path, train in by_path(optim.trainable_mask(frozen, shapes)).items() if train}
    assert trained == {path for path in changed if path.endswith("lora_b")}


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_no_gradient_of_the_base_is_computed(scan):
    """The step's cost falls by about the products for the base's own gradients, a third of all."""
    layout, batch = Layout(), packed(4, 16)

    def flops(**changes):
        model = build(decoder(embed_dim=64, mlp_dim=256, vocab_size=30, **changes))
        tx = optim.make(OptimConfig(), 10, model.shapes(), model.axes())
        trainable = optim.trainable_mask(OptimConfig(), model.shapes())
        abstract = train_state.abstract(model, tx, layout, ema=False)
        one = step.make_train_step(
            model, LanguageObjective(), tx, lambda _: 0.1, layout, abstract, seed=0, accumulation=2, trainable=trainable
        )
        return one.lower(abstract, batch).compile(compiler_options=QUICK).cost_analysis()["flops"]

    assert flops(lora=dict(rank=1), scan_layers=scan) < 0.8 * flops(scan_layers=scan)


# ----------------------------------------------------------------------------------------- where a run starts


@dataclasses.dataclass
class State:
    params: dict
    ema: None = None


jax.tree_util.register_dataclass(State, ["params", "ema"], [])


def save(folder, params):
    with checkpoint.Checkpointer(folder, CheckpointConfig()) as saving:
        saving.save(4, State(jax.tree.map(jnp.asarray, params)), {})


def started(folder, model):
    state = State(model.init(jax.random.key(1)))
    return starts._parameters_only(str(folder), State(model.shapes()), lambda: state)


def test_a_run_without_adapters_gives_the_base_and_they_start_afresh(tmp_path):
    base, model = build(decoder()), build(decoder(lora=RANK))
    save(tmp_path, numbers(base))
    start = started(tmp_path, model)
    assert start.how.endswith(f"step 4 of {tmp_path} and 14 fresh arrays of adapters (model.lora)")
    fresh = by_path(jax.jit(model.init, compiler_options=QUICK)(jax.random.key(1)))
    found = by_path(start.state.params)
    assert_same_bits({path: leaf for path, leaf in found.items() if not lora.is_adapter(path)}, by_path(numbers(base)))
    for path in filter(lora.is_adapter, found):
        np.testing.assert_array_equal(found[path], fresh[path])


def test_a_run_with_adapters_goes_on_with_them(tmp_path):
    model = build(decoder(lora=RANK))
    save(tmp_path, numbers(model))
    start = started(tmp_path, model)
    assert_same_bits(start.state.params, numbers(model))
    with pytest.raises(UserError, match="lora_a is float32.* there and float32.* here"):
        started(tmp_path, build(decoder(lora=dict(rank=4))))
    with pytest.raises(UserError, match="that run has adapters, and this one has none"):
        started(tmp_path, build(decoder()))


def test_adapters_of_random_numbers_are_refused(tmp_path):
    model = build(decoder(lora=RANK))
    message = "give the run that they adapt with checkpoint.init_from"
    with checkpoint.Checkpointer(tmp_path, CheckpointConfig()) as saving, pytest.raises(UserError, match=message):
        starts.start(CheckpointConfig(), saving, State(model.shapes()), lambda: None)


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lora=dict(rank=2, targets=("querry",))), "did you mean query"),
        (dict(lora=dict(rank=2, targets=("query", "embedding"))), "embedding/table can have no adapter"),
        (dict(lora=dict(rank=2, targets=("head",)), tie_embeddings=False), "head/kernel can have no adapter"),
        (dict(lora=dict(rank=2, targets=("up",)), moe=dict(num_experts=4)), "moe/up/kernel can have no adapter"),
        (dict(lora=dict(rank=2, targets=("router",)), moe=dict(num_experts=4)), "moe/router/kernel can have no"),
    ],
)
def test_targets_that_can_have_none_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(decoder(**changes)).shapes()


def test_experts_stay_as_they_are_beside_attention_with_adapters():
    leaves = by_path(build(decoder(lora=dict(rank=2), moe=dict(num_experts=4))).shapes())
    assert {path.split("/")[-2] for path in leaves if lora.is_adapter(path)} == {"query", "key", "value", "out"}


@pytest.mark.parametrize(
    "item, message",
    [
        ("model.lora.alpha=8", "model.lora.rank is 0, so there are no adapters"),
        ("model.lora.targets=query", "model.lora.rank is 0, so there are no adapters"),
        ("model.lora.targets=(", "it is no regular expression"),
    ],
)
def test_keys_that_say_nothing_are_refused(item, message):
    rank = ["model.lora.rank=2"] if "regular" in message else []
    with pytest.raises(ConfigError, match=message):
        check_model(load("", [*rank, item]).model)


def test_latent_attention_decodes_with_its_adapters(x64):
    """Its decoding multiplies by the kernels of keys and values themselves where they have no adapters."""
    cfg = decoder(latent=dict(kv_rank=6, rope_dim=4), lora=RANK | dict(targets=("key_up", "value_up", "query")))
    model = build(cfg, dtype="float64")
    params, tokens = numbers(model), packed(2, 6)["tokens"]
    positions = np.broadcast_to(np.arange(6), (2, 6))
    logits, _ = model.apply_cached(params, {}, tokens, positions, 8)
    np.testing.assert_allclose(logits, model.apply(params, tokens), rtol=0, atol=1e-12)


def test_flops_leave_out_gradients_of_the_base():
    plain, adapted = build(decoder()), build(decoder(lora=dict(rank=3, targets=("up",))))
    before = training_flops(plain.cfg, plain.shapes(), plain.axes(), 8)
    after = training_flops(adapted.cfg, adapted.shapes(), adapted.axes(), 8)
    assert after.attention == before.attention
    assert after.matrices == before.matrices * 4 / 6 + 6 * 2 * 3 * (16 + 24)


@pytest.mark.parametrize("changes", [{}, DISENTANGLED], ids=["learned", "disentangled"])
def test_an_encoders_head_trains_beside_adapters(changes):
    cfg = encoder(head="text", num_labels=3, lora=dict(rank=2), **changes)
    model = registry.build(cfg, mesh_layout(data=3), Precision())
    trained = {path for path, train in by_path(optim.trainable_mask(OptimConfig(), model.shapes())).items() if train}
    heads = {path for path in by_path(model.shapes()) if path.startswith("labels/")}
    assert heads and heads == {path for path in trained if not lora.is_adapter(path)}
    batch = texts(3, 8)
    scores = model.apply(numbers(model), Texts(batch["tokens"]), batch["starts"], method="text_logits")
    assert scores.shape == (*batch["starts"].shape, 3)  # relative positions, too few for the mesh, are not split
    with pytest.raises(ConfigError, match="there are .*query"):
        lora.check_targets(LoraConfig(rank=2, targets=("linear",)), model.shapes())
