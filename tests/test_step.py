"""The training step: the same numbers on every mesh and split, bad steps that leave no trace, nothing recompiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, assert_close, assert_same_bits, build, decoder, mesh_layout, numbers, packed

from llm_jax.config import OptimConfig
from llm_jax.models import layers
from llm_jax.objectives.language import LanguageObjective
from llm_jax.sharding import Layout, path_name
from llm_jax.training import optim, step
from llm_jax.training import state as train_state

ROWS, LENGTH = 32, 8
CONFIGS = {
    "plain": decoder(num_heads=8, head_dim=4, mlp_dim=32, vocab_multiple=32),
    "learned": decoder(
        num_heads=8, head_dim=4, num_kv_heads=4, mlp_dim=32, vocab_multiple=32, positions="learned", norm="layernorm",
        activation="gelu", bias="all", remat="full", dropout=dict(embedding=0.1, attention=0.1, mlp_output=0.1),
    ),
    "relative": decoder(
        num_heads=8, head_dim=4, num_kv_heads=4, mlp_dim=32, vocab_multiple=32, positions="relative",
        relative_buckets=8, relative_max_distance=16, tie_embeddings=False, qk_norm="head", scan_layers=False,
    ),
}  # fmt: skip


def gradient_program(name, layout, accumulation, dtype, chunk=0):
    """Compiled: (params, batch) to the gradient, the terms and the weight."""
    model = build(CONFIGS[name], layout, dtype)
    objective = LanguageObjective(z_loss=1e-2, label_smoothing=0.1, chunk=chunk)

    def gradients(params, batch):
        return step.gradients(
            model, objective, params, batch, layout=layout, seed=3, step=jnp.int32(7), accumulation=accumulation
        )

    shardings = layout.parameter_shardings(model.shapes(), model.axes())
    params = numbers(model)
    if layout.mesh is not None:
        params = jax.device_put(params, shardings)
    out_shardings = (shardings, layout.replicated, layout.replicated)
    run = jax.jit(gradients, out_shardings=out_shardings, compiler_options=QUICK)
    return run(params, layout.put_batch(packed(ROWS, LENGTH), ROWS))


@functools.cache
def on_one_device(name, accumulation, dtype="float64"):
    return jax.tree.map(np.asarray, gradient_program(name, Layout(), accumulation, dtype))


def remat_warnings(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if "rematerialization" in line]


@pytest.mark.parametrize(
    ("name", "sizes", "accumulation"),
    [("plain", (2, 2, 2), 4), ("plain", (1, 8, 1), 1), ("learned", (2, 2, 2), 4), ("relative", (2, 2, 1, 2), 4)],
    ids=str,
)
def test_a_mesh_gives_the_gradient_of_one_device(x64, capfd, name, sizes, accumulation):
    """In float64 to 1e-10, packed, with unequal weights among micro-batches; and XLA never has to replicate. Every mesh
    with every other choice: test_equivalence.py."""
    found = gradient_program(name, mesh_layout(*sizes), accumulation, "float64")
    assert_close(found, on_one_device(name, accumulation), atol=1e-10)
    assert remat_warnings(capfd) == []


@pytest.mark.parametrize(("name", "sizes"), [("plain", ()), ("relative", (2, 1, 2, 2))], ids=str)
def test_chunks_of_the_loss_change_nothing(x64, capfd, name, sizes):
    """With a tied head and padded ids, and with a head of its own."""
    layout = mesh_layout(*sizes) if sizes else Layout()
    found = gradient_program(name, layout, 4, "float64", chunk=2)
    assert_close(found, on_one_device(name, 4), atol=1e-10)
    assert remat_warnings(capfd) == []


def test_the_warning_about_rematerialization_would_be_seen(capfd, monkeypatch):
    """Without gathering the embedding table over fsdp first, XLA replicates, and says so."""
    plain = lambda table, ids, layout, axes, dtype: jnp.take(table.astype(dtype), ids, axis=0)  # noqa: E731
    monkeypatch.setattr(layers, "look_up", plain)
    monkeypatch.setattr(layers.Embedding, "_gathered", lambda self: self.table.astype(self.precision.compute))
    for sizes in ((2, 2, 2), (1, 4, 2)):  # the first with jax 0.10, the second with jax 0.12
        gradient_program("plain", mesh_layout(*sizes), 1, "float32")
    assert remat_warnings(capfd)


def test_evaluation_is_the_same_on_a_mesh():
    """Sums over all devices, the vocabulary split over some of them."""
    sums = []
    for layout in (Layout(), mesh_layout(2, 2, 2)):
        model = build(CONFIGS["learned"], layout)
        evaluate = jax.jit(
            lambda params, batch, model=model: LanguageObjective().evaluation(model, params, batch),
            compiler_options=QUICK,
        )
        batch = layout.put_batch(packed(ROWS, LENGTH) | {"target_bytes": np.ones((ROWS, LENGTH), np.int32)}, ROWS)
        sums.append(jax.tree.map(np.asarray, evaluate(numbers(model), batch)))
    assert sums[0].keys() == {"nats", "tokens", "correct", "bytes"}
    assert_close(sums[1], sums[0], atol=1e-6)


# ------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("accumulation", [4, 16])
def test_accumulation_gives_the_gradient_of_the_whole_batch(x64, accumulation):
    assert_close(on_one_device("plain", accumulation), on_one_device("plain", 1), atol=1e-12)


def test_micro_batches_have_unequal_weights():
    """So that a mean of means, which the test above must not pass with, would differ."""
    weights = packed(ROWS, LENGTH)["loss_weights"]
    per_micro = weights.reshape(-1, 4, LENGTH).sum((0, 2))
    assert len(set(per_micro.tolist())) == 4


def test_rows_are_dealt_where_they_are():
    """Row b goes to micro-batch b mod 4: every device deals out its own rows, and none moves."""
    rows = np.arange(16).reshape(16, 1)
    assert np.asarray(step.deal(jnp.asarray(rows), 4, Layout(), 1))[..., 0].tolist() == [
        [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]
    ]  # fmt: skip
    layout = mesh_layout(4)
    batch = layout.put_batch({"a": rows}, 16)["a"]
    dealt = jax.jit(lambda x: step.deal(x, 4, layout, 1))
    np.testing.assert_array_equal(dealt(batch), step.deal(jnp.asarray(rows), 4, Layout(), 1))
    program = dealt.lower(batch).compile().as_text()
    assert not any(name in program for name in ("all-to-all", "all-gather", "collective-permute", "all-reduce"))


# ---------------------------------------------------------------------------------------------- a real step

OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, clip_norm=1.0)
STEPS = 20


@dataclasses.dataclass
class Run:
    """A model with its optimizer, first state and step."""

    layout: Layout
    abstract: train_state.TrainState
    state: train_state.TrainState
    step: object
    learning_rate: object

    def batch(self, seed=0, **changes):
        return self.layout.put_batch(packed(ROWS, LENGTH, seed=seed) | changes, ROWS)


def start(layout=None, accumulation=1, ema_decay=0.0, dtype="float32", cfg=CONFIGS["plain"], init=None, **optimizer):
    """`init` makes the state from (model, tx, abstract state); by default it holds `numbers`."""
    layout = layout or Layout()
    model = build(cfg, layout, dtype)
    settings = dataclasses.replace(OPTIM, **optimizer)
    tx = optim.make(settings, STEPS, model.shapes(), model.axes())
    abstract = train_state.abstract(model, tx, layout, ema=ema_decay > 0, offload=settings.offload)
    rate = optim.learning_rate(settings, STEPS)
    train_step = step.make_train_step(
        model, LanguageObjective(), tx, rate, layout, abstract, seed=0, accumulation=accumulation,
        ema_decay=ema_decay, trainable=optim.trainable_mask(settings, model.shapes()),
    )  # fmt: skip
    if init:
        state = init(model, tx, abstract)
    else:
        params = jax.tree.map(jnp.asarray, numbers(model))
        state = jax.device_put(train_state.fresh(params, tx, ema=ema_decay > 0), train_state.shardings(abstract))
    return Run(layout, abstract, state, train_step, rate)


def seeded(model, tx, abstract):
    return train_state.init(model, tx, abstract, seed=1)


def quick(run, batch=None):
    """The run's step, compiled ahead for its state and batch, as the loop does."""
    return run.step.lower(run.state, batch or run.batch()).compile(compiler_options=QUICK)


def losses(run, train_step):
    state, found = run.state, []
    for seed in range(3):
        state, metrics = train_step(state, run.batch(seed))
        found.append(float(metrics["loss"]))
    return found, state


@pytest.fixture(scope="module")
def single():
    """A run on one device with an average, its compiled step, and a copy of its first state."""
    run = start(ema_decay=0.75)
    return run, quick(run), jax.tree.map(np.asarray, run.state)


def fresh(run, stored):
    return dataclasses.replace(run, state=jax.tree.map(jnp.array, stored))


@pytest.fixture(scope="module")
def expected(single):
    """Losses and parameters of three steps on one device."""
    run, train_step, stored = single
    found, state = losses(fresh(run, stored), train_step)
    return found, jax.tree.map(np.asarray, state.params)


ZERO1 = dict(parameter_rules=("embed=",), optimizer_rules=("embed=data+fsdp",))
ZERO2 = ZERO1 | dict(gradient_rules=("embed=data+fsdp",))
SPLIT_RESIDUAL = dict(activation_rules=("residual_length=sequence+tensor",))


@pytest.mark.parametrize(
    ("sizes", "accumulation", "rules"),
    [
        ((8, 1, 1), 1, {}),
        ((1, 8, 1), 4, {}),
        ((2, 2, 2), 1, {}),
        ((2, 4, 1), 1, ZERO1),
        ((2, 4, 1), 4, ZERO2),
        ((1, 2, 2, 2), 1, SPLIT_RESIDUAL),
        ((4, 2, 1), 1, dict(across_slices=("data=2",))),
    ],
    ids=["data", "fsdp, accumulation", "all", "ZeRO-1", "ZeRO-2, accumulation", "residual split", "two slices"],
)
def test_training_is_the_same_on_every_mesh(capfd, expected, sizes, accumulation, rules):
    run = start(mesh_layout(*sizes, **rules), accumulation)
    found, state = losses(run, quick(run))
    np.testing.assert_allclose(found, expected[0], rtol=1e-5)
    assert_close(jax.tree.map(np.asarray, state.params), expected[1], atol=1e-4)
    assert jax.tree.map(lambda x: x.sharding, state) == train_state.shardings(run.abstract)
    assert remat_warnings(capfd) == []


def test_gradients_lie_as_their_rules_say():
    """ZeRO-2 keeps a part of each gradient on each device; ZeRO-1 the whole."""
    held = []
    for rules in (ZERO1, ZERO2):
        layout = mesh_layout(2, 4, 1, **rules)
        model = build(SMALL, layout)
        run = jax.jit(functools.partial(step.gradients, model, LanguageObjective(), layout=layout, seed=0, step=0))
        grads, _, _ = run.lower(numbers(model), layout.put_batch(packed(ROWS, LENGTH), ROWS)).compile().output_shardings
        held.append(grads["stack"]["block_0"]["mlp"]["up"]["kernel"].shard_shape((16, 24)))
    assert held == [(16, 24), (2, 24)]


def test_the_optimizer_state_waits_in_host_memory(expected):
    """Of the parameters named, and to the same numbers."""
    offload = (".*kernel",)
    run = start(mesh_layout(2, 2, 2), offload=offload)
    kinds = {
        path_name(path): x.sharding.memory_kind
        for path, x in jax.tree_util.tree_leaves_with_path(adam_state(run.state).mu)
    }
    assert {kinds[name] for name in kinds if name.endswith("kernel")} == {"pinned_host"}
    assert "pinned_host" not in {kinds[name] for name in kinds if not name.endswith("kernel")}
    found, state = losses(run, quick(run))
    np.testing.assert_allclose(found, expected[0], rtol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, state) == train_state.shardings(run.abstract)


SMALL = decoder(num_layers=1, scan_layers=False, activation="gelu")


def adam_state(state):
    parts = jax.tree.leaves(state.opt_state, is_leaf=lambda node: hasattr(node, "mu"))
    return next(part for part in parts if hasattr(part, "mu"))


def test_the_optimizer_state_is_split_like_its_parameters():
    state = start(mesh_layout(2, 4, 1), cfg=SMALL, init=seeded).state
    for moments in (adam_state(state).mu, adam_state(state).nu):
        assert jax.tree.map(lambda x: x.sharding, moments) == jax.tree.map(lambda x: x.sharding, state.params)
    shard = lambda tree: tree["stack"]["block_0"]["mlp"]["up"]["kernel"].sharding.shard_shape((16, 24))  # noqa: E731
    assert shard(state.params) == (4, 24)

    state = start(mesh_layout(2, 4, 1, **ZERO1), cfg=SMALL, ema_decay=0.9, init=seeded).state
    moments = adam_state(state)
    assert [shard(tree) for tree in (state.params, moments.mu, moments.nu, state.ema)] == [(16, 24)] + 3 * [(2, 24)]


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["no mesh", "mesh"])
def test_nothing_is_compiled_twice(sizes):
    """Neither after the first step, nor for a state that was restored."""
    run = start(sizes and mesh_layout(*sizes), cfg=SMALL, ema_decay=0.9, init=seeded)
    stored = jax.tree.map(np.asarray, run.state)
    state = run.state
    for seed in range(3):
        state, _ = run.step(state, run.batch(seed))
        assert run.step._cache_size() == 1
    restored = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), stored, run.abstract)
    run.step(restored, run.batch())
    assert run.step._cache_size() == 1


def test_the_state_is_donated(single):
    run, train_step, stored = single
    old = fresh(run, stored).state
    state, _ = train_step(old, run.batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_state_made_round_given_parameters_can_be_donated(single):
    """No two of its leaves share a buffer."""
    run, train_step, stored = single
    model = build(CONFIGS["plain"])
    tx = optim.make(OPTIM, STEPS, model.shapes(), model.axes())
    state = train_state.fresh(jax.tree.map(jnp.array, stored.params), tx, ema=True)
    state, _ = train_step(state, run.batch())
    assert int(state.step) == 1


def test_metrics_say_what_was_done(single):
    run, train_step, stored = single
    layout, model, batch = Layout(), build(CONFIGS["plain"]), run.batch()
    gradients = functools.partial(step.gradients, model, LanguageObjective(), layout=layout, seed=0, step=0)
    grads, terms, weight = jax.jit(gradients, compiler_options=QUICK)(stored.params, batch)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    state = fresh(run, stored).state
    for update in range(3):
        state, metrics = train_step(state, batch)
        np.testing.assert_allclose(metrics["learning_rate"], run.learning_rate(update), rtol=1e-6)
        assert float(metrics["tokens"]) == packed(ROWS, LENGTH)["loss_weights"].sum() == float(weight)
        if update == 0:
            np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
            np.testing.assert_allclose(metrics["loss"], terms["loss"], rtol=1e-6)
    assert [int(x) for x in (state.step, state.updates, state.bad_in_a_row, state.bad_total)] == [3, 3, 0, 0]


def test_frozen_parameters_stay_and_do_not_count():
    """The norm reported is the one that is clipped by; the bytes that the targets stand for are passed on."""
    run = start(cfg=SMALL, freeze=("embedding/.*", "stack/.*/mlp/.*"))
    before = jax.tree.map(np.asarray, run.state.params)
    batch = run.batch(target_bytes=np.full((ROWS, LENGTH), 2, np.int32))
    state, metrics = quick(run, batch)(run.state, batch)
    gradients = functools.partial(step.gradients, build(SMALL), LanguageObjective(), layout=Layout(), seed=0, step=0)
    grads, _, _ = jax.jit(gradients, compiler_options=QUICK)(before, batch)
    total = 0.0
    for (path, grad), old, new in zip(
        jax.tree_util.tree_leaves_with_path(grads), *map(jax.tree.leaves, (before, state.params)), strict=True
    ):
        frozen = "embedding" in jax.tree_util.keystr(path) or "'mlp'" in jax.tree_util.keystr(path)
        assert (np.asarray(new) == old).all() == frozen, path
        total += 0 if frozen else (np.asarray(grad, np.float64) ** 2).sum()
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(total), rtol=1e-5)
    assert float(metrics["bytes"]) == 2 * ROWS * LENGTH


def test_the_average_follows_its_formula(single):
    run, train_step, stored = single
    state = fresh(run, stored).state
    average = jax.tree.map(lambda x: x.astype(np.float64), stored.params)
    assert_same_bits(stored.ema, stored.params)
    for seed in range(3):
        state, _ = train_step(state, run.batch(seed))
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.asarray(p, np.float64), average, state.params)
    assert_close(state.ema, average, atol=1e-6)


def test_the_average_of_bfloat16_parameters_is_kept_in_float32():
    """In bfloat16, 0.999 a + 0.001 p is a: the average would never move."""
    run = start(ema_decay=0.999, dtype="bfloat16", cfg=SMALL, learning_rate=0.5, warmup_steps=0)
    before = jax.tree.map(np.asarray, run.state.ema)
    state, _ = quick(run)(run.state, run.batch())
    for new, old in zip(jax.tree.leaves(state.ema), jax.tree.leaves(before), strict=True):
        assert new.dtype == old.dtype == np.float32
        assert (new != old).mean() > 0.5


# ------------------------------------------------------------------------------------------------ bad batches


def weights_with(value):
    weights = packed(ROWS, LENGTH)["loss_weights"]
    weights[0, 0] = value
    return weights


@pytest.fixture(scope="module")
def guarded():
    """A run with an average and accumulation, one good step in, and its compiled step."""
    run = start(accumulation=2, ema_decay=0.9)
    train_step = quick(run)
    state, _ = train_step(run.state, run.batch())
    return run, train_step, jax.tree.map(np.asarray, state)


def trained(state):
    return state.updates, state.params, state.opt_state, state.ema


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
def test_a_bad_batch_leaves_no_trace(guarded, value):
    run, train_step, before = guarded
    state, metrics = train_step(jax.tree.map(jnp.asarray, before), run.batch(loss_weights=weights_with(value)))
    assert_same_bits(trained(state), trained(before))
    assert [int(x) for x in (state.step, state.bad_in_a_row, state.bad_total)] == [2, 1, 1]
    assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])

    state, _ = train_step(state, run.batch(loss_weights=weights_with(value)))
    assert [int(x) for x in (state.step, state.bad_in_a_row, state.bad_total)] == [3, 2, 2]

    state, metrics = train_step(state, run.batch(1))  # the next good one counts as if nothing had been
    assert [int(x) for x in (state.step, state.updates, state.bad_in_a_row, state.bad_total)] == [4, 2, 0, 2]
    expected, expected_metrics = train_step(jax.tree.map(jnp.asarray, before), run.batch(1))
    assert_same_bits(trained(state), trained(expected))
    assert metrics["learning_rate"] == expected_metrics["learning_rate"]


def test_bad_parameters_are_noticed(guarded):
    """One NaN that got into the parameters poisons every gradient: all steps are bad, nothing else changes."""
    run, train_step, before = guarded
    params = jax.tree.map(np.copy, before.params)
    params["stack"]["blocks"]["mlp"]["up"]["kernel"][1, 2, 3] = np.nan
    poisoned = dataclasses.replace(before, params=params)
    state, _ = train_step(jax.tree.map(jnp.asarray, poisoned), run.batch())
    assert_same_bits(trained(state), trained(poisoned))
    assert int(state.bad_in_a_row) == 1


def test_a_gradient_that_overflows_is_bad_though_the_loss_is_finite(guarded):
    run, train_step, before = guarded
    params = jax.tree.map(np.copy, before.params)
    for name in ("up", "gate"):
        params["stack"]["blocks"]["mlp"][name]["kernel"] *= 0
    params["stack"]["blocks"]["mlp"]["down"]["kernel"][:] = 3e38
    params["stack"]["blocks"]["mlp"]["gate"]["kernel"][:] = 1.0
    huge = dataclasses.replace(before, params=params)
    state, metrics = train_step(jax.tree.map(jnp.asarray, huge), run.batch())
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert_same_bits(trained(state), trained(huge))
    assert int(state.bad_total) == 1


def test_a_batch_of_padding_is_no_update_and_no_fault(guarded):
    run, train_step, before = guarded
    zeros = np.zeros((ROWS, LENGTH), np.int32)
    nothing = run.batch(loss_weights=zeros.astype(np.float32), segment_ids=zeros)
    state, metrics = train_step(jax.tree.map(jnp.asarray, before), nothing)
    assert_same_bits(trained(state), trained(before))
    assert [int(x) for x in (state.step, state.bad_in_a_row, state.bad_total)] == [2, 0, 0]
    assert float(metrics["loss"]) == float(metrics["tokens"]) == float(metrics["grad_norm"]) == 0
    # it does not end a series of bad steps either
    state, _ = train_step(jax.tree.map(jnp.asarray, before), run.batch(loss_weights=weights_with(np.nan)))
    state, _ = train_step(state, nothing)
    state, _ = train_step(state, run.batch(loss_weights=weights_with(np.nan)))
    assert [int(x) for x in (state.step, state.bad_in_a_row, state.bad_total)] == [4, 2, 2]


# ------------------------------------------------------------------------------------------------- randomness


def test_dropout_differs_by_step_and_row_and_is_a_function_of_the_seed():
    cfg = decoder(dropout=dict(mlp_output=0.5))
    model = build(cfg)
    row = {name: value[:1] for name, value in packed(1, LENGTH, weights=False).items()}
    batch = {name: np.repeat(value, 2, 0) for name, value in row.items()}  # two equal rows, two micro-batches
    params = numbers(model)

    def loss(seed, number, accumulation):
        fixed = dict(layout=Layout(), seed=seed, step=number, accumulation=accumulation)
        return step.gradients(model, LanguageObjective(), params, batch, **fixed)[1]["loss"]

    run = jax.jit(loss, static_argnums=(0, 2), compiler_options=QUICK)
    first = float(run(0, 5, 2))
    assert first == float(run(0, 5, 2))
    assert first != float(run(0, 6, 2))
    assert first != float(run(1, 5, 2))
    np.testing.assert_allclose(run(0, 5, 1), first, rtol=1e-6)  # the same masks, however rows are dealt
    # were the second row dropped out like the first, the mean would be that of the first alone
    one = {name: value[:1] for name, value in batch.items()}
    alone = jax.jit(
        lambda: step.gradients(model, LanguageObjective(), params, one, layout=Layout(), seed=0, step=5)[1]["loss"],
        compiler_options=QUICK,
    )
    assert first != float(alone())
