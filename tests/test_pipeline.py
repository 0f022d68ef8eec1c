"""The pipeline over stages against a plain loop over layers: values, gradients, what travels, what is kept."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny import QUICK, assert_close, build, decoder, mesh_layout, numbers, packed, slow

from llm_jax.config.kinds import LayerKind
from llm_jax.config.pipeline import bubble, check_pipeline
from llm_jax.errors import ConfigError
from llm_jax.models.pipeline import pipeline
from llm_jax.objectives.language import LanguageObjective
from llm_jax.sharding import Layout
from llm_jax.training import step

LENGTH, WIDTH, HIDDEN = 4, 8, 16
AXES = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}
BATCHED = {"gain": True, "place": False, "number": True}
POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


def toy_block(layout, kind, params, x, key, shared):
    """Reads all that a block can: each row's and the whole batch's numbers, a key, parameters; and counts something."""
    h = jnp.einsum("btd,df->btf", x * shared["gain"][:, None, None] + shared["place"][None, :, None], params["up"])
    h = layout(jnp.sin(h) if kind.window else jnp.tanh(h), "batch", "length", "mlp")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, shared["number"])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, h.shape[1:]))(keys)
    h = jnp.where(keep, h, 0)
    x = x + jnp.einsum("btf,fd->btd", h, params["down"])
    routing = {"square": jnp.square(h).mean((1, 2)), "kinds": jnp.abs(h).sum(1)[:, :3]}
    return layout(x, "batch", "residual_length", "embed"), routing


def draw(layers, rows):
    """Parameters, x, what layers share; and the gradients of the results."""
    rng = np.random.default_rng(0)
    params = {
        "up": 0.5 * rng.normal(size=(layers, WIDTH, HIDDEN)),
        "down": 0.3 * rng.normal(size=(layers, HIDDEN, WIDTH)),
    }
    shared = {"gain": rng.normal(size=rows), "place": rng.normal(size=LENGTH)}
    d_routing = {"square": rng.normal(size=rows), "kinds": rng.normal(size=(rows, 3))}
    x, d_x = rng.normal(size=(2, rows, LENGTH, WIDTH))
    return (params, x, shared), (d_x, d_routing)


def results(stack, arrays, numbers, d_out):
    """What `stack` gives, and the gradients of its arguments."""
    out, pull = jax.vjp(lambda params, x, shared: stack(params, x, shared | {"number": numbers}), *arrays)
    return out, pull(d_out)


def loop(keys, kinds):
    """The reference: one layer after the other, without a mesh."""

    def stack(params, x, shared):
        def layer(kind, x, params_and_key):
            return toy_block(Layout(), kind, params_and_key[0], x, params_and_key[1], shared)

        routings = []
        for i, kind in enumerate(kinds):
            x, routing = layer(kind, x, jax.tree.map(lambda a: a[i], (params, keys)))  # noqa: B023
            routings.append(routing)
        return x, jax.tree.map(lambda *parts: sum(parts), *routings)

    return stack


def piped(keys, kinds, layout, stages, repeats, microbatches, remat="full"):
    block, policy = functools.partial(toy_block, layout), POLICIES[remat]
    if policy is not None:
        block = jax.checkpoint(block, policy=policy, prevent_cse=False, static_argnums=0)
    sizes = dict(stages=stages, repeats=repeats, microbatches=microbatches)

    def stack(params, x, shared):
        return pipeline(block, kinds, params, x, keys, shared, batched=BATCHED, policy=policy, layout=layout, **sizes)

    return stack


def case(stages, repeats, microbatches, depth=1, remat="full", **mesh):
    """The compiled pipeline's program text, its results and the reference's."""
    layout = mesh_layout(stage=stages, **mesh)
    layers, rows = stages * repeats * depth, 2 * microbatches * layout.batch_shards
    arrays, d_out = draw(layers, rows)
    keys, numbers = jax.random.split(jax.random.key(1), layers), np.arange(rows)
    kinds = [LayerKind(window=layer % depth == 1) for layer in range(layers)]
    expected = jax.jit(functools.partial(results, loop(keys, kinds)), compiler_options=QUICK)(arrays, numbers, d_out)

    def put(array, axes, rules):
        return jax.device_put(array, NamedSharding(layout.mesh, layout.spec(axes, rules)))

    params, x, shared = arrays
    params = {name: put(params[name], AXES[name], layout.parameter_rules) for name in params}
    x = put(x, ("batch", "residual_length", "embed"), layout.activation_rules)
    step = jax.jit(functools.partial(results, piped(keys, kinds, layout, stages, repeats, microbatches, remat)))
    compiled = step.lower((params, x, shared), numbers, d_out).compile(compiler_options=QUICK)
    return compiled.as_text(), compiled((params, x, shared), numbers, d_out), expected


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("rounds", [1, 2], ids="M={}S".format)
@pytest.mark.parametrize("repeats", [1, 2], ids="R={}".format)
@pytest.mark.parametrize("stages", [2, slow(4), slow(8)], ids="S={}".format)
def test_a_plain_loop_to_the_last_digits(x64, stages, repeats, rounds):
    _, found, expected = case(stages, repeats, rounds * stages)
    assert_equal(found, expected)


SIZES = {  # stages, repeats, microbatches, layers a piece, remat
    "one micro-batch": (4, 1, 1, 1, "full"),
    "fewer than stages": (4, 1, 2, 2, "full"),
    "no multiple of stages": (2, 1, 5, 1, "none"),
    "no multiple, circular": (2, 3, 3, 2, "none"),
    "nothing recomputed": (4, 2, 4, 1, "none"),
    "products kept": (2, 2, 4, 1, "dots"),
    "six rounds": (4, 6, 5, 1, "full"),
}


@pytest.mark.parametrize("sizes", SIZES)
def test_other_sizes(x64, sizes):
    _, found, expected = case(*SIZES[sizes])
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("mesh", "repeats"),
    [
        slow(dict(data=2), 1),
        slow(dict(fsdp=4), 2),
        slow(dict(tensor=2), 2),
        slow(dict(sequence=2), 1),
        (dict(sequence=2, tensor=2, activation_rules=("residual_length=sequence+tensor",)), 1),
        (dict(fsdp=2, tensor=2), 2),
    ],
    ids=str,
)
def test_with_other_mesh_axes(x64, capfd, mesh, repeats):
    _, found, expected = case(2, repeats, 4, **mesh)
    assert_equal(found, expected)
    assert "full rematerialization" not in capfd.readouterr().err


def test_without_a_mesh(x64):
    arrays, d_out = draw(8, 6)
    keys, numbers = jax.random.split(jax.random.key(1), 8), np.arange(6)

    def run(stack):
        return jax.jit(functools.partial(results, stack), compiler_options=QUICK)(arrays, numbers, d_out)

    kinds = [LayerKind(window=layer % 2 == 1) for layer in range(8)]
    assert_equal(run(piped(keys, kinds, Layout(), 2, 2, 3)), run(loop(keys, kinds)))


def test_blocks_without_statistics_or_keys(x64):
    arrays, (d_out, _) = draw(4, 4)
    layout = mesh_layout(stage=2)

    def block(kind, params, x, key, shared):
        assert key is None
        return jnp.tanh(x @ params["up"]) @ params["down"], None

    def stack(params, x, shared):
        sizes = dict(stages=2, repeats=1, microbatches=2)
        return pipeline(
            block, [LayerKind()] * 4, params, x, None, shared, batched=BATCHED, policy=None, layout=layout, **sizes
        )

    def reference(params, x, shared):
        for layer in range(4):
            x, _ = block(None, jax.tree.map(lambda p: p[layer], params), x, None, None)  # noqa: B023
        return x, None

    def run(stack):
        return jax.jit(functools.partial(results, stack), compiler_options=QUICK)(arrays, np.arange(4), (d_out, None))

    assert_equal(run(stack), run(reference))


def test_idle_turns_compute_on_real_rows(x64):
    """A block that is NaN on rows of zeros, and whose slope is infinite there, is so nowhere."""
    arrays, (d_out, _) = draw(4, 6)
    layout = mesh_layout(stage=4)

    def block(kind, params, x, key, shared):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True) + x @ params["up"] @ params["down"], None

    def stack(params, x, shared):
        sizes = dict(stages=4, repeats=1, microbatches=3)
        return pipeline(
            block, [LayerKind()] * 4, params, x, None, shared, batched=BATCHED, policy=None, layout=layout, **sizes
        )

    run = jax.jit(functools.partial(results, stack), compiler_options=QUICK)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(arrays, np.arange(6), (d_out, None))))


# --------------------------------------------------------------------------------------- what travels, what is kept


def collectives(text):
    """{kind: the shapes that it moves, for each instruction}, of a compiled program."""
    found = {}
    pattern = r" = (.*?) (collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\("
    for result, kind in re.findall(pattern, text):
        shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", result)]
        found.setdefault(kind, []).extend(shapes)
    return found


def test_only_rows_go_from_stage_to_stage(x64):
    """Each hand-over, forward and backward, is one collective-permute of one micro-batch and one of each statistic."""
    text, _, _ = case(4, 1, 8, depth=2)
    moved = collectives(text)
    rows, statistics = (1, 2, LENGTH, WIDTH), [(1, 2), (1, 2, 3)]
    assert sorted(moved.pop("collective-permute")) == sorted(2 * [rows, *statistics])
    # After the loop, results and gradients of what all stages read: never parameters, whose shapes end otherwise.
    whole = moved.pop("all-reduce")
    assert (8, 2, LENGTH, WIDTH) in whole and not [shape for shape in whole if HIDDEN in shape]
    assert not moved


def test_with_rounds_each_stage_sends_its_share_of_the_parameters_once(x64):
    """And gets its gradients back; XLA alone would gather all layers on every stage."""
    text, _, _ = case(4, 2, 4, depth=3)
    moved = collectives(text)
    sent = [shape for shape in moved.pop("collective-permute") if HIDDEN in shape]
    both_ways = 2
    share = 2 * 3 * WIDTH * HIDDEN  # R n layers of a parameter
    assert sum(map(np.prod, sent)) == both_ways * 2 * share
    assert not [shape for shape in moved.pop("all-reduce") if HIDDEN in shape] and not moved


@pytest.mark.parametrize("remat", POLICIES)
@pytest.mark.parametrize("repeats", [1, 2], ids="R={}".format)
def test_no_turn_keeps_parameters(x64, repeats, remat):
    """Kept for the backward pass: rows for each turn and layer, more of them the less is recomputed."""
    stages, microbatches, depth = 2, 4, 3
    arrays, _ = draw(stages * repeats * depth, 8)
    keys = jax.random.split(jax.random.key(1), stages * repeats * depth)
    stack = piped(keys, [LayerKind()] * len(keys), mesh_layout(stage=stages), stages, repeats, microbatches, remat)
    run = lambda params, x, shared: stack(params, x, shared | {"number": np.arange(8)})  # noqa: E731
    kept = jax.eval_shape(lambda *arrays: jax.vjp(run, *arrays)[1], *arrays)
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    turns = repeats * microbatches + stages - 1
    assert not [shape for shape in shapes if shape[-2:] in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)) and turns in shape]
    inputs = shapes.count((turns, depth, stages, 2, LENGTH, WIDTH))
    hidden = len([shape for shape in shapes if shape[-3:] == (2, LENGTH, HIDDEN)])
    assert (inputs, hidden > 0) == (1, False) if remat == "full" else inputs >= 1 and hidden > 0


# ------------------------------------------------------------------------------------------ arithmetic and refusals


def test_bubble():
    assert bubble(1, 1, 1) == 0
    assert bubble(4, 1, 4) == 3 / 7
    assert bubble(4, 1, 12) == bubble(4, 3, 4) == 3 / 15


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((10, 4, 1, 4, 8, 1), ("mesh.stage = 4", "num_layers = 10", "give one of 2, 5, 10")),
        ((12, 4, 2, 4, 8, 1), ("mesh.stage = 4", "num_layers = 12", "stage_repeats", "give one of 2, 3, 6")),
        ((7, 2, 8, 2, 8, 1), ("mesh.stage = 2", "num_layers = 7", "set mesh.stage_repeats=1, or mesh.stage=1")),
        ((8, 4, 2, 2, 8, 1), ("mesh.stage_microbatches = 2", "mesh.stage = 4", "at least 4", "mesh.stage_repeats=1")),
        ((8, 4, 1, 3, 8, 1), ("mesh.stage_microbatches = 3", "8 rows", "give one of 1, 2, 4, 8", "multiple of 3")),
        ((8, 4, 1, 4, 8, 4), ("mesh.stage_microbatches = 4", "4 parts", "give one of 1, 2", "multiple of 16")),
        ((8, 4, 2, 4, 8, 4), ("mesh.stage_microbatches = 4", "make the rows a multiple of 16")),
        ((8, 1, 2, 1, 8, 1), ("mesh.stage_repeats = 2", "mesh.stage is 1")),
        ((8, 1, 1, 4, 8, 1), ("mesh.stage_microbatches = 4", "mesh.stage is 1", "leave it 0")),
    ],
)
def test_refusals(sizes, words):
    with pytest.raises(ConfigError) as error:
        check_pipeline(*sizes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1, 3, 1), (8, 4, 1, 2, 8, 4), (8, 4, 2, 4, 16, 4), (8, 8, 1, 5, 5, 1)])
def test_what_can_run(sizes):
    check_pipeline(*sizes)


# ------------------------------------------------------------------------------------------------ whole models

SMALL = dict(num_layers=4, num_heads=4, head_dim=4, embed_dim=16, mlp_dim=16, vocab_multiple=16)
MODELS = {
    "rotary": decoder(**SMALL, remat="full", dropout=dict(embedding=0.1, attention=0.1, mlp_output=0.1)),
    "relative": decoder(**SMALL, positions="relative", relative_buckets=8, relative_max_distance=16),
    "rest": decoder(
        **SMALL | dict(num_layers=5),
        remat="dots",
        layer_pattern=("window", "full"),
        sliding_window=3,
        dropout=dict(mlp_output=0.1),
    ),
    "experts": decoder(**SMALL, remat="dots", moe=dict(num_experts=4, top_k=2, balance_loss=0.1)),
}
ROWS = 16


def gradient(name, layout, accumulation=1):
    """The gradient of a whole model's loss, its terms and its weight, over packed rows in float64."""
    model = build(MODELS[name], layout, "float64")
    objective = LanguageObjective(moe=model.cfg.moe, num_layers=4)
    params = numbers(model)
    shardings = layout.parameter_shardings(model.shapes(), model.axes())
    if layout.mesh is not None:
        params = jax.device_put(params, shardings)

    def run(params, batch):
        options = dict(layout=layout, seed=3, step=jnp.int32(7), accumulation=accumulation)
        return step.gradients(model, objective, params, batch, **options)

    run = jax.jit(run, out_shardings=(shardings, None, None), compiler_options=QUICK)
    return run(params, layout.put_batch(packed(ROWS, 8), ROWS))


@functools.cache
def on_one_device(name):
    return jax.tree.map(np.asarray, gradient(name, Layout()))


@pytest.mark.parametrize(
    ("name", "mesh", "accumulation"),
    [
        slow("rotary", dict(stage=4), 1),
        ("rotary", dict(stage=2, stage_repeats=2, data=2, fsdp=2), 2),
        slow("rotary", dict(stage=2, sequence=2, tensor=2, stage_microbatches=8), 1),
        slow("relative", dict(stage=2, stage_repeats=2, stage_microbatches=4, tensor=2), 1),
        slow("relative", dict(stage=4, sequence=2), 2),
        ("rest", dict(stage=2, fsdp=2), 1),
        slow("experts", dict(stage=2, stage_repeats=2, expert=2), 1),
    ],
    ids=str,
)
def test_whole_models_give_the_gradient_of_one_device(x64, capfd, name, mesh, accumulation):
    """With the same dropout, packed rows and routing."""
    assert_close(gradient(name, mesh_layout(**mesh), accumulation), on_one_device(name), atol=1e-10)
    assert "full rematerialization" not in capfd.readouterr().err


def test_rows_that_do_not_split_are_refused():
    model = build(MODELS["rotary"], mesh_layout(stage=2, stage_microbatches=4))
    with pytest.raises(ValueError, match="6 rows do not split into the 4 micro-batches of mesh.stage_microbatches"):
        jax.eval_shape(model.apply, model.shapes(), jnp.zeros((6, 8), jnp.int32))
