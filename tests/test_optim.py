"""The optimizers against torch, numpy and optax, masks by role."""

import dataclasses
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.config.schema import OptimConfig
from llm_jax.errors import ConfigError
from llm_jax.training import optim

GOLDEN = pathlib.Path(__file__).parent / "golden"


def shapes_of(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def run(cfg, params, axes, gradients, total=100):
    """Parameters after one update for each gradient tree."""
    tx = optim.make(cfg, total, shapes_of(params), axes)
    state = tx.init(params)

    @jax.jit
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params


def wave(seed, *shape):
    n = math.prod(shape)
    return np.sin(np.arange(n) * (0.7 + 0.1 * seed) + seed).reshape(shape).astype(np.float32)


PLAIN = dict(schedule="constant", weight_decay=0.0, clip_norm=0.0)

# ----------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(
    ("axes", "role"),
    [
        (("embed", "mlp"), "matrix"),
        (("layers", "embed", "heads"), "matrix"),
        (("layers", "expert", "embed", "mlp"), "matrix"),
        (("embed", "expert"), "matrix"),
        (("vocab", "embed"), "embedding"),
        (("embed", "vocab"), "embedding"),
        (("position", "embed"), "embedding"),
        (("buckets", "heads"), "embedding"),
        (("norm",), "vector"),
        (("layers", "norm"), "vector"),
        (("layers", "expert", "mlp"), "vector"),
        (("vocab",), "vector"),
        ((), "vector"),
        (("layers",), "vector"),
    ],
)
def test_roles_come_from_axes(axes, role):
    assert optim.role(axes) == role


AXES = {
    "embedding": {"table": ("vocab", "embed")},
    "blocks": {"norm": {"scale": ("layers", "norm")}, "up": {"kernel": ("layers", "embed", "mlp")}},
}
PARAMS = {
    "embedding": {"table": wave(1, 7, 4)},
    "blocks": {"norm": {"scale": wave(2, 2, 4)}, "up": {"kernel": wave(3, 2, 4, 6)}},
}
GRADIENTS = jax.tree.map(lambda p: 0.5 * p + 0.1, PARAMS)


@pytest.mark.parametrize(
    ("mask", "decayed"),
    [("matrices", (True, False, True)), ("hidden", (False, False, True)), ("all", (True, True, True))],
)
def test_decay_reaches_the_roles_of_the_mask(mask, decayed):
    cfg = OptimConfig(**PLAIN | dict(weight_decay=0.5, decay_mask=mask, learning_rate=0.1))
    after = run(cfg, PARAMS, AXES, [jax.tree.map(np.zeros_like, PARAMS)])
    after = (after["embedding"]["table"], after["blocks"]["norm"]["scale"], after["blocks"]["up"]["kernel"])
    before = (PARAMS["embedding"]["table"], PARAMS["blocks"]["norm"]["scale"], PARAMS["blocks"]["up"]["kernel"])
    for new, old, decays in zip(after, before, decayed, strict=True):
        np.testing.assert_allclose(new, old * (0.95 if decays else 1.0), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- AdamW


def our_adamw():
    cfg = OptimConfig(learning_rate=1e-2, warmup_steps=3)
    params = {"matrix": wave(1, 4, 3), "vector": wave(2, 5)}
    axes = {"matrix": ("embed", "mlp"), "vector": ("norm",)}
    tx = optim.make(cfg, 10, shapes_of(params), axes)

    @jax.jit
    def step(constants, state, params):
        gradients = jax.tree.map(lambda c, p: c + 0.1 * p, constants, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(10):
        params, state = step({name: wave(10 + i, *p.shape) for name, p in params.items()}, state, params)
    return params


def test_ten_adamw_steps_equal_stored_torch():
    expected = json.loads((GOLDEN / "adamw.json").read_text())
    for name, value in our_adamw().items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parity
def test_ten_adamw_steps_equal_torch():
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make_adamw", GOLDEN / "make_adamw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = module.run()
    assert expected == json.loads((GOLDEN / "adamw.json").read_text())
    for name, value in our_adamw().items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------ Muon


def newton_schulz(m):
    """Five quintic steps towards the nearest semi-orthogonal matrix, in float64 (Jordan 2024)."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def muon_reference(p, gradients, lr, beta):
    m = np.zeros(p.shape)
    for t, g in enumerate(gradients, start=1):
        m = beta * m + (1 - beta) * g
        nesterov = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        p = p - lr * 0.2 * math.sqrt(max(p.shape)) * newton_schulz(nesterov)
    return p


def test_muon_is_newton_schulz_on_matrices_and_adam_elsewhere():
    axes = {
        "stack": ("layers", "embed", "mlp"),
        "heads": ("embed", "heads", "head_dim"),
        "out": ("heads", "head_dim", "embed"),
        "table": ("vocab", "embed"),
        "head": ("embed", "vocab"),
        "norms": ("layers", "norm"),
    }
    shapes = {"stack": (3, 4, 6), "heads": (8, 2, 3), "out": (2, 3, 8)}
    shapes |= {"table": (9, 4), "head": (4, 9), "norms": (3, 4)}
    params = {name: wave(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    gradients = [{name: wave(10 * i + len(name), *p.shape) for name, p in params.items()} for i in range(1, 4)]
    cfg = OptimConfig(**PLAIN | dict(name="muon", learning_rate=0.05))
    with jax.default_matmul_precision("highest"):
        after = run(cfg, params, axes, gradients)

    as_matrix = {"heads": (8, 6), "out": (6, 8)}
    for name, shape in as_matrix.items():
        expected = muon_reference(params[name].reshape(shape), [g[name].reshape(shape) for g in gradients], 0.05, 0.9)
        np.testing.assert_allclose(after[name].reshape(shape), expected, atol=2e-5)
    for layer in range(3):
        expected = muon_reference(params["stack"][layer], [g["stack"][layer] for g in gradients], 0.05, 0.9)
        np.testing.assert_allclose(after["stack"][layer], expected, atol=2e-5)
    adam = run(OptimConfig(**PLAIN | dict(learning_rate=0.05)), params, axes, gradients)
    for name in ("table", "head", "norms"):
        np.testing.assert_array_equal(after[name], adam[name])


def test_muon_with_frozen_matrices():
    cfg = OptimConfig(**PLAIN | dict(name="muon", freeze=("blocks/up/.*",)))
    after = run(cfg, PARAMS, AXES, [GRADIENTS])
    np.testing.assert_array_equal(after["blocks"]["up"]["kernel"], PARAMS["blocks"]["up"]["kernel"])
    assert (after["embedding"]["table"] != PARAMS["embedding"]["table"]).all()


# ---------------------------------------------------------------------------------- the other optimizers


def test_sgd_has_heavy_ball_momentum_and_decoupled_decay():
    cfg = OptimConfig(**PLAIN | dict(name="sgd", learning_rate=0.1, weight_decay=0.5))
    p, m, g = np.float64(2.0), 0.0, 1.0
    for _ in range(3):
        m = 0.9 * m + g
        p = p - 0.1 * (m + 0.5 * p)
    params, gradients = {"w": np.full((1, 1), 2.0, np.float32)}, {"w": np.ones((1, 1), np.float32)}
    after = run(cfg, params, {"w": ("embed", "mlp")}, [gradients] * 3)
    np.testing.assert_allclose(after["w"], [[p]], rtol=1e-6)


def test_lion_takes_the_sign():
    cfg = OptimConfig(**PLAIN | dict(name="lion", learning_rate=0.1, beta1=0.5, beta2=0.5))
    gradients = [{"w": np.float32([4, -1])}, {"w": np.float32([-1, -1])}]
    after = run(cfg, {"w": np.zeros(2, np.float32)}, {"w": ("norm",)}, gradients)
    np.testing.assert_allclose(after["w"], [-0.2, 0.2], rtol=1e-6)  # m = [2, -.5]; then sign([.5, -.75])


def test_adafactor_equals_optax_on_single_tensors():
    params = {"w": wave(1, 128, 130), "b": wave(2, 5)}
    gradients = [{"w": wave(i, 128, 130), "b": wave(i, 5)} for i in (3, 4, 5)]
    cfg = OptimConfig(**PLAIN | dict(name="adafactor", learning_rate=0.1))
    ours = run(cfg, params, {"w": ("embed", "mlp"), "b": ("mlp",)}, gradients)
    tx = optax.adafactor(0.1)
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, params)


def test_adam_without_bias_correction_is_berts():
    """google-research/bert optimization.py: m and v as they are, from zero, and decay beside them."""
    cfg = OptimConfig(**PLAIN | dict(learning_rate=0.1, beta2=0.9, weight_decay=0.5, eps=1e-6, bias_correction=False))
    p, m, v = np.float64(2.0), 0.0, 0.0
    for g in (1.0, -3.0, 0.5):
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g * g
        p = p - 0.1 * (m / (np.sqrt(v) + 1e-6) + 0.5 * p)
    gradients = [{"w": np.full((1, 1), g, np.float32)} for g in (1.0, -3.0, 0.5)]
    after = run(cfg, {"w": np.full((1, 1), 2.0, np.float32)}, {"w": ("embed", "mlp")}, gradients)
    np.testing.assert_allclose(after["w"], [[p]], rtol=1e-6)


def test_lamb_equals_optax_on_single_tensors():
    """But for norms and biases, whose update is Adam's own, as in the authors' code."""
    params, axes = {"w": wave(1, 6, 5), "b": wave(2, 5)}, {"w": ("embed", "mlp"), "b": ("mlp",)}
    gradients = [{"w": wave(i, 6, 5), "b": wave(i, 5)} for i in (3, 4, 5)]
    cfg = OptimConfig(**PLAIN | dict(name="lamb", learning_rate=0.1, beta2=0.999, eps=1e-6, weight_decay=0.01))
    ours = run(cfg, params, axes, gradients)
    tx = optax.lamb(0.1, eps=1e-6, weight_decay=0.01)
    theirs, state = {"w": params["w"]}, tx.init({"w": params["w"]})
    for gradient in gradients:
        updates, state = tx.update({"w": gradient["w"]}, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-5, atol=1e-6)
    adam = run(dataclasses.replace(cfg, name="adamw"), params, axes, gradients)
    np.testing.assert_allclose(ours["b"], adam["b"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "normalize"), [("sgd", False), ("sgd", True), ("adafactor", False), ("muon", False), ("lamb", False)]
)
def test_a_stack_of_layers_trains_as_its_layers_do(name, normalize):
    """Scanned or not, the same numbers: nothing is averaged or normalised across the layer axis."""
    cfg = OptimConfig(**PLAIN | dict(name=name, learning_rate=0.1, weight_decay=0.1, normalize_gradients=normalize))
    scale = np.float32([1, 10, 100])[:, None, None]
    stacked = {"w": wave(1, 3, 128, 129) * scale, "n": wave(2, 3, 5) * scale[..., 0]}
    gradients = [{"w": wave(i, 3, 128, 129) / scale, "n": wave(i, 3, 5) / scale[..., 0]} for i in (3, 4)]
    axes = {"w": ("layers", "embed", "mlp"), "n": ("layers", "norm")}
    after = run(cfg, stacked, axes, gradients)
    for layer in range(3):
        here = [{name: x[layer] for name, x in tree.items()} for tree in (stacked, *gradients)]
        alone = run(cfg, here[0], {"w": axes["w"][1:], "n": axes["n"][1:]}, here[1:])
        for name in alone:
            np.testing.assert_allclose(after[name][layer], alone[name], rtol=1e-5, atol=1e-6)


def test_adafactor_refuses_to_factor_over_layers():
    params = {"w": jax.ShapeDtypeStruct((200, 128, 256), jnp.float32)}
    with pytest.raises(ConfigError, match="factored over the stack"):
        optim.make(OptimConfig(name="adafactor"), 10, params, {"w": ("layers", "embed", "mlp")})


# -------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("changes", [dict(), dict(freeze=("b",)), dict(normalize_gradients=True)], ids=str)
def test_a_norm_that_is_known_is_not_taken_again(changes):
    """It is that of the gradients as they come, of the parameters that train."""
    settings = PLAIN | dict(name="sgd", beta1=0.0, learning_rate=1.0, clip_norm=0.5) | changes
    params = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
    tx = optim.make(OptimConfig(**settings), 10, shapes_of(params), {"w": ("embed", "mlp"), "b": ("norm",)})
    gradients, state = jax.tree.map(lambda p: 3 * p, params), tx.init(params)
    counted = None if "freeze" not in changes else {"w": True, "b": False}
    norm = optim.global_norm(gradients, counted)
    expected, _ = tx.update(gradients, state, params)
    found, _ = tx.update(gradients, state, params, grad_norm=norm)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    halved, _ = tx.update(gradients, state, params, grad_norm=2 * norm)
    assert (halved["w"] == expected["w"] * (1 if "normalize_gradients" in changes else 0.5)).all()


def test_clipping_by_the_global_norm():
    cfg = OptimConfig(**PLAIN | dict(name="sgd", beta1=0.0, learning_rate=1.0, clip_norm=1.0))
    params = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    axes = {"a": ("norm",), "b": ("norm",)}

    def one(a, b):
        return {"a": np.float32([a]), "b": np.float32([b])}

    after = run(cfg, params, axes, [one(3, 4)])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-0.6, -0.8], rtol=1e-6)
    after = run(cfg, params, axes, [one(0.3, 0.4)])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-0.3, -0.4], rtol=1e-6)
    after = run(cfg, params, axes, [one(0, 0)])
    assert after["a"] == after["b"] == 0.0
    frozen = OptimConfig(**PLAIN | dict(name="sgd", beta1=0.0, learning_rate=1.0, clip_norm=1.0, freeze=("b",)))
    after = run(frozen, params, axes, [one(0.5, 400)])  # the frozen gradient does not count
    assert after["a"] == -0.5 and after["b"] == 0.0


def test_global_norm_is_float32_and_can_leave_out_frozen_leaves():
    tree = {"a": jnp.full((300,), 1.0, jnp.bfloat16), "b": jnp.full((1,), 50.0)}
    assert optim.global_norm(tree) == pytest.approx(math.sqrt(300 + 2500), rel=1e-6)
    mask = optim.trainable_mask(OptimConfig(freeze=("b",)), tree)
    assert optim.global_norm(tree, mask) == pytest.approx(math.sqrt(300), rel=1e-6)


def test_normalize_gradients():
    cfg = OptimConfig(**PLAIN | dict(name="sgd", beta1=0.0, learning_rate=1.0, normalize_gradients=True))
    params = {"w": np.zeros((2, 2), np.float32)}
    after = run(cfg, params, {"w": ("layers", "norm")}, [{"w": np.float32([[3, 4], [0, 0]])}])
    np.testing.assert_allclose(after["w"], [[-0.6, -0.8], [0, 0]], rtol=1e-5)


# ---------------------------------------------------------------------------- multipliers, freezing, dtypes


def test_multipliers_scale_step_and_decay():
    def one_update(**changes):
        return run(OptimConfig(**PLAIN | {"weight_decay": 0.1} | changes), PARAMS, AXES, [GRADIENTS])

    after = one_update(learning_rate=0.01, lr_multipliers=("embedding/.*=0.5", ".*/scale=2"))
    half, plain = one_update(learning_rate=0.005), one_update(learning_rate=0.01)
    np.testing.assert_allclose(after["embedding"]["table"], half["embedding"]["table"], rtol=1e-6)
    np.testing.assert_array_equal(after["blocks"]["up"]["kernel"], plain["blocks"]["up"]["kernel"])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_frozen_parameters_do_not_move_and_have_no_state(name):
    cfg = OptimConfig(name=name, freeze=("embedding/.*", ".*/scale"))
    after = run(cfg, PARAMS, AXES, [GRADIENTS] * 2)
    np.testing.assert_array_equal(after["embedding"]["table"], PARAMS["embedding"]["table"])
    np.testing.assert_array_equal(after["blocks"]["norm"]["scale"], PARAMS["blocks"]["norm"]["scale"])
    assert (after["blocks"]["up"]["kernel"] != PARAMS["blocks"]["up"]["kernel"]).any()
    state = jax.eval_shape(optim.make(cfg, 10, shapes_of(PARAMS), AXES).init, PARAMS)
    names = optim.paths(state)
    assert not any("table" in name or "norm" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(freeze=("embeding/.*",)), "matches no parameter.*nearest paths: .*embedding/table"),
        (dict(freeze=("embedding",)), "whole path must match"),
        (dict(freeze=(".*",)), "freezes every parameter"),
        (dict(freeze=("(",)), "not a regular expression"),
        (dict(lr_multipliers=("blocks/.*",)), "not PATTERN=FACTOR"),
        (dict(lr_multipliers=("blocks/.*=-1",)), "not PATTERN=FACTOR"),
        (dict(lr_multipliers=("block/.*=2",)), "matches no parameter"),
        (dict(lr_multipliers=("blocks/.*=2", ".*/kernel=2")), "two entries match the parameter blocks/up/kernel"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        optim.make(OptimConfig(**changes), 10, shapes_of(PARAMS), AXES)


def test_axes_must_name_every_dimension():
    axes = AXES | {"blocks": AXES["blocks"] | {"up": {"kernel": ("embed",)}}}
    with pytest.raises(ValueError, match="blocks/up/kernel"):
        optim.make(OptimConfig(), 10, shapes_of(PARAMS), axes)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_bfloat16_parameters_have_float32_state(name):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    tx = optim.make(OptimConfig(name=name), 10, shapes_of(params), AXES)
    state = tx.init(params)
    updates, after = tx.update(jax.tree.map(lambda p: p * 0.5, params), state, params)
    assert shapes_of(after) == shapes_of(state)
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves((state, updates)))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(optax.apply_updates(params, updates)))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_float64_stays_float64(name, x64):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), PARAMS)
    tx = optim.make(OptimConfig(name=name), 10, shapes_of(params), AXES)
    updates, state = tx.update(params, tx.init(params), params)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(updates))
    assert all(x.dtype != jnp.float32 for x in jax.tree.leaves(state) if x.ndim > 1)


def test_the_schedule_counts_only_updates_whose_state_is_kept():
    cfg = OptimConfig(**PLAIN | dict(name="sgd", beta1=0.0, learning_rate=1.0, warmup_steps=4, warmup_form="(i+1)/w"))
    params, gradients = {"w": np.zeros(1, np.float32)}, {"w": np.ones(1, np.float32)}
    tx = optim.make(cfg, 10, shapes_of(params), {"w": ("norm",)})
    state = tx.init(params)
    first, kept = tx.update(gradients, state, params)
    tx.update(gradients, kept, params)  # rejected: its state is dropped
    second, _ = tx.update(gradients, kept, params)
    assert (first["w"], second["w"]) == (-0.25, -0.5)


# ------------------------------------------------------------------------------------------- state shardings


@pytest.mark.parametrize("freeze", [(), ("table",)])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_every_large_leaf_of_the_state_is_sharded(name, freeze):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    described = {  # name: shape, axes, spec
        "table": ((256, 128), ("vocab", "embed"), ("tensor", "fsdp")),
        "up": ((4, 128, 512), ("layers", "embed", "mlp"), (None, "fsdp", "tensor")),
        "norm": ((4, 128), ("layers", "norm"), ()),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _, _) in described.items()}
    axes = {name: names for name, (_, names, _) in described.items()}
    shardings = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, (_, _, spec) in described.items()}
    replicated = NamedSharding(mesh, PartitionSpec())
    tx = optim.make(OptimConfig(name=name, freeze=freeze), 10, params, axes)
    abstract = jax.eval_shape(tx.init, params)
    found = optim.state_shardings(abstract, params, shardings, replicated)
    assert jax.tree.structure(found) == jax.tree.structure(abstract)

    by_shape = {shape: spec for shape, _, spec in described.values()}
    if name == "adafactor":  # row and column statistics
        by_shape |= {(4, 512): (None, "tensor"), (256,): ("tensor",), (128,): ("fsdp",)}
    for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(found), strict=True):
        if optim.path_name(path).endswith("v_row/up"):  # of the shape that the norms have
            assert sharding.spec == PartitionSpec(None, "fsdp")
        else:
            assert sharding.spec == PartitionSpec(*by_shape.get(x.shape, ()))
    zeros = {name: np.zeros(x.shape, x.dtype) for name, x in params.items()}
    made = jax.jit(tx.init, out_shardings=found)(zeros)
    assert jax.tree.map(lambda x: x.sharding, made) == found


# ------------------------------------------------------------------------------------------------ balance biases

ROUTER = {"moe": {"balance_bias": np.zeros((2, 3), np.float32), "up": {"kernel": np.ones((2, 4, 4), np.float32)}}}
ROUTER_AXES = {"moe": {"balance_bias": ("layers", "balance"), "up": {"kernel": ("layers", "embed", "mlp")}}}
PULLS = ROUTER | {"moe": ROUTER["moe"] | {"balance_bias": np.float32([[300, 0, -300], [-1, 2, -1]])}}


def updates_of(cfg, params=ROUTER, **options):
    tx = optim.make(cfg, 10, shapes_of(params), ROUTER_AXES, **options)
    return tx.update(PULLS, tx.init(params), params)[0]


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "lion"])
def test_a_balance_bias_moves_by_its_rate_against_the_sign_alone(name):
    """Whatever the optimizer, its rate, decay, clipping or normalisation; and the others as if it were not there."""
    changes = dict(learning_rate=0.1, weight_decay=0.5, decay_mask="all", clip_norm=0.1, lr_multipliers=(".*=3.0",))
    cfg = OptimConfig(name=name, **changes)
    found = updates_of(cfg, balance_rate=0.01)
    np.testing.assert_allclose(found["moe"]["balance_bias"], 0.01 * np.float32([[-1, 0, 1], [1, -1, 1]]))
    del_bias = lambda tree: {"moe": {"up": tree["moe"]["up"]}}  # noqa: E731
    tx = optim.make(cfg, 10, shapes_of(del_bias(ROUTER)), del_bias(ROUTER_AXES))
    alone, _ = tx.update(del_bias(PULLS), tx.init(del_bias(ROUTER)), del_bias(ROUTER))
    np.testing.assert_array_equal(found["moe"]["up"]["kernel"], alone["moe"]["up"]["kernel"])


def test_a_frozen_balance_bias_stays_and_one_without_a_rate_is_an_error():
    found = updates_of(OptimConfig(freeze=(".*balance_bias",)), balance_rate=0.01)
    assert not found["moe"]["balance_bias"].any() and np.asarray(found["moe"]["up"]["kernel"]).all()
    with pytest.raises(ValueError, match="make.* needs balance_rate"):
        updates_of(OptimConfig())
    with pytest.raises(ConfigError, match="names moe/balance_bias alone, which has no learning rate"):
        updates_of(OptimConfig(lr_multipliers=(".*balance_bias=2.0",)), balance_rate=0.01)


def test_a_balance_bias_is_not_in_the_norm():
    counted = optim.counted_mask(None, ROUTER_AXES)
    assert counted == {"moe": {"balance_bias": False, "up": {"kernel": True}}}
    assert float(optim.global_norm(PULLS, counted)) == pytest.approx(32**0.5)
    frozen = {"moe": {"balance_bias": True, "up": {"kernel": False}}}
    assert jax.tree.leaves(optim.counted_mask(frozen, ROUTER_AXES)) == [False, False]
    assert optim.counted_mask(None, {"w": ("embed", "mlp")}) is None
