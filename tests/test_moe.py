"""The mixture-of-experts layer: its parameters, and the same numbers on every mesh, mapped over stages or not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from tiny import QUICK, assert_close, decoder, mesh_layout, packed, slow
from tiny import build as build_decoder
from tiny import numbers as draw

from llm_jax.config import Config, OptimConfig
from llm_jax.kernels.exchange import Exchange
from llm_jax.models.moe import MoE
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import optim, step

ROWS, LENGTH, EMBED = 8, 8, 16
CONFIGS = {
    "dropless": decoder(moe=dict(num_experts=8)),
    "capacity": decoder(moe=dict(num_experts=8, capacity_factor=1.0)),
    "dropless, biases": decoder(moe=dict(num_experts=8, top_k=3), bias="all", activation="gelu"),
    "capacity, biases": decoder(
        moe=dict(num_experts=8, top_k=3, capacity_factor=1.0, renormalize=False),
        bias="all", activation="gelu",
    ),
    "one choice": decoder(moe=dict(num_experts=8, top_k=1, renormalize=False)),
    "all experts": decoder(moe=dict(num_experts=8, top_k=8)),
    "V3": decoder(
        moe=dict(num_experts=8, top_k=3, expert_dim=8, scores="sigmoid", groups=4, top_groups=2, scale=2.5,
                 balance_bias=True),
    ),
    "GPT-OSS": decoder(moe=dict(num_experts=8, router_bias=True), bias="all", activation="clamped_swiglu"),
    "all experts, capacity": decoder(moe=dict(num_experts=8, top_k=8, capacity_factor=0.5)),
}  # fmt: skip


def build(cfg, layout=None, dtype="float64"):
    return MoE(cfg, layout or Layout(), Precision(jnp.dtype(dtype), jnp.dtype(dtype)))


def shapes_and_axes(module):
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, EMBED)))["params"]
    axes = jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda node: hasattr(node, "names"))
    return nn.unbox(boxed), axes


def batch(rows=ROWS, length=LENGTH, seed=0):
    """x, the gradient of the output, and packed rows, one of which ends in padding and one of which is padding."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, rows, length, EMBED))
    segments = np.ones((rows, length), np.int32)
    segments[:, length // 2 :] = 2
    segments[0, -length // 4 :] = 0
    segments[-1] = 0
    return x, dy, segments


def numbers(cfg, layout=None, stages=0, collapsed=False):
    """Output, routing, and gradients of parameters and x, of a loss that takes all of them in."""
    layout = layout or Layout()
    module = build(cfg, layout)
    shapes, axes = shapes_and_axes(module)
    rng = np.random.default_rng(1)
    leading = (stages,) if stages else ()
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leading + leaf.shape), shapes)
    x, dy, segments = (np.stack([a] * stages) if stages else a for a in batch())
    if collapsed:  # all tokens go to expert 5, and their second choice is 4
        x[..., 0] = 1
        params["router"]["kernel"][:] = 0
        params["router"]["kernel"][0, 4:6] = 20, 40
    if layout.mesh is not None:
        leading = ("layers",) if stages else ()
        place = lambda array, names, rules: jax.device_put(  # noqa: E731
            array, NamedSharding(layout.mesh, layout.spec(leading + names, rules))
        )
        params = jax.tree.map(
            lambda array, names: place(array, names, layout.parameter_rules), params, axes,
            is_leaf=lambda node: isinstance(node, np.ndarray),
        )  # fmt: skip
        if not stages:
            x, dy = (place(a, ("batch", "length", "embed"), layout.activation_rules) for a in (x, dy))
            segments = place(segments, ("batch", "length"), layout.activation_rules)

    apply = lambda params, x, segments: module.apply({"params": params}, x, segments)  # noqa: E731
    if stages:
        apply = jax.vmap(apply, spmd_axis_name="stage" if layout.mesh is not None else None)

    def loss(params, x, dy, segments):
        y, routing = apply(params, x, segments)
        pull = 0 if routing.pull is None else routing.pull
        return (y * dy).sum() + (0.1 * routing.balance + 0.01 * routing.z + pull).sum(), (y, routing)

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)
    return jax.tree.map(np.asarray, program(params, x, dy, segments))


@functools.cache
def on_one_device(name, stages=0, collapsed=False):
    return numbers(CONFIGS[name], None, stages, collapsed)


def remat_warnings(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if "rematerialization" in line]


# ------------------------------------------------------------------------------------------------ on meshes

MESHES = [
    dict(expert=8), dict(data=2, fsdp=2, expert=2), dict(expert=2, sequence=2, tensor=2),
]  # fmt: skip
MORE_MESHES = [
    dict(expert=2), dict(expert=4), dict(data=2, expert=4), dict(fsdp=2, expert=4), dict(fsdp=4, expert=2),
    dict(expert=2, tensor=4), dict(expert=2, sequence=4), dict(fsdp=2, expert=2, tensor=2),
    dict(fsdp=2, sequence=2, tensor=2), dict(fsdp=2, expert=2, sequence=2), dict(stage=2, expert=2, tensor=2),
]  # fmt: skip
OTHERS = [dict(fsdp=2, expert=2, tensor=2), dict(expert=2, sequence=2, tensor=2)]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [(name, sizes) for name in ("dropless", "capacity") for sizes in MESHES]
    + [slow(name, sizes) for name in ("dropless", "capacity") for sizes in MORE_MESHES]
    + [slow(name, sizes) for name in list(CONFIGS)[2:] for sizes in OTHERS],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items()),
)
def test_every_mesh_gives_what_one_device_gives(x64, capfd, name, sizes):
    assert_close(numbers(CONFIGS[name], mesh_layout(**sizes)), on_one_device(name), atol=1e-10)
    assert remat_warnings(capfd) == []


@pytest.mark.parametrize("name", ["dropless", "capacity", "dropless, biases"])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(stage=2, expert=2, tensor=2),
        slow(dict(stage=2, fsdp=2, expert=2)),
        slow(dict(stage=2, expert=2, sequence=2)),
    ],
    ids=str,
)
def test_layers_of_two_stages_run_at_once(x64, capfd, name, sizes):
    """As the pipeline runs them: mapped over stages that the mesh splits, then differentiated."""
    assert_close(numbers(CONFIGS[name], mesh_layout(**sizes), stages=2), on_one_device(name, stages=2), atol=1e-10)
    assert remat_warnings(capfd) == []


def test_the_capacity_form_drops_some_and_the_dropless_form_none():
    with jax.enable_x64(True):
        assert on_one_device("capacity")[0][1][1].dropped.sum() > 5
        assert not on_one_device("dropless")[0][1][1].dropped.any()


@pytest.mark.parametrize("sizes", [dict(expert=8), dict(expert=4, tensor=2), dict(expert=2, sequence=4)], ids=str)
def test_nothing_is_dropped_when_all_tokens_go_to_one_expert(x64, sizes):
    found = numbers(CONFIGS["dropless"], mesh_layout(**sizes), collapsed=True)
    expected = on_one_device("dropless", collapsed=True)
    assert_close(found, expected, atol=1e-10)
    y, routing = found[0][1]
    assert np.abs(y[1:-1]).max(-1).min() > 1e-3  # every real token has been through its expert
    np.testing.assert_allclose(routing.balance, 4.0 * np.array([6, *[8] * 6, 0]))  # E / k a token: the worst there is


@pytest.mark.parametrize("name", ["dropless", "capacity"])
@pytest.mark.parametrize(("rows", "length"), [(3, 1), (3, 5)])
def test_batches_that_a_mesh_cannot_split_evenly(x64, name, rows, length):
    """Decoding: few rows, one token each."""
    x, _, segments = batch(rows, max(length, 4))
    x, segments = x[:, :length], segments[:, :length]
    outputs = []
    for layout in (Layout(), mesh_layout(expert=2, sequence=2, fsdp=2), mesh_layout(expert=8)):
        module = build(CONFIGS[name], layout)
        shapes, _ = shapes_and_axes(module)
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda leaf, rng=rng: 0.3 * rng.normal(size=leaf.shape), shapes)
        run = jax.jit(
            lambda params, x, s, module=module: module.apply({"params": params}, x, s), compiler_options=QUICK
        )
        outputs.append(jax.tree.map(np.asarray, run(params, x, segments)))
    for found in outputs[1:]:
        assert_close(found, outputs[0], atol=1e-10)


def test_text_need_not_depend_on_capacity(x64):
    """`drop=False`: the capacity form's parameters, with all choices computed."""
    x, _, segments = batch()
    cfg, shapes = CONFIGS["capacity"], shapes_and_axes(build(CONFIGS["capacity"]))[0]
    rng = np.random.default_rng(1)
    params = {"params": jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), shapes)}
    apply = lambda cfg, **how: jax.jit(functools.partial(build(cfg).apply, **how), compiler_options=QUICK)(  # noqa: E731
        params, x, segments
    )
    found = apply(cfg, drop=False)
    assert_close(found, apply(CONFIGS["dropless"]), atol=1e-12)
    assert np.abs(found[0] - apply(cfg)[0]).max() > 0.1


# ------------------------------------------------------------------------------------------------ ragged exchange


def emulated_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What JAX documents, from what every device gathers of all others: XLA has no such collective for CPUs."""
    everyone = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    me, row = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    for sent, starts, sizes, places in zip(*everyone, strict=True):
        index = row - places[me]
        hit = (index >= 0) & (index < sizes[me])
        output = jnp.where(hit[:, None], sent.at[index + starts[me]].get(mode="clip"), output)
    return output


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [(dict(expert=4, tensor=2), 0), (dict(fsdp=2, expert=2, sequence=2), 0), (dict(stage=2, expert=4), 2)], ids=str,
)  # fmt: skip
def test_the_ragged_exchange_does_what_the_padded_one_does(x64, monkeypatch, sizes, stages):
    monkeypatch.setattr(Exchange, "_by_platform", lambda self, padded, ragged, *args: ragged(*args))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    found = numbers(CONFIGS["dropless"], mesh_layout(**sizes), stages)
    assert_close(found, on_one_device("dropless", stages), atol=1e-10)


@pytest.mark.parametrize(("platform", "ragged"), [("tpu", True), ("cuda", True), ("cpu", False)])
@pytest.mark.parametrize("stages", [0, 2])
def test_rows_travel_ragged_where_xla_can(platform, ragged, stages):
    """Forward and backward, mapped over stages or not, as the program is lowered for a platform."""
    module = build(CONFIGS["dropless"], mesh_layout(stage=2, expert=4), "float32")
    leading = (stages,) if stages else ()
    args = (shapes_and_axes(module)[0], jax.ShapeDtypeStruct((ROWS, LENGTH, EMBED), jnp.float32))
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leading + leaf.shape, leaf.dtype), args)
    apply = lambda params, x: module.apply({"params": params}, x)[0]  # noqa: E731
    apply = jax.vmap(apply, spmd_axis_name="stage") if stages else apply
    program = jax.jit(jax.grad(lambda params, x: apply(params, x).sum(), argnums=(0, 1))).trace(*args)
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all") == (4 if ragged else 0)


# ------------------------------------------------------------------------------------------------ parameters


def test_parameters_and_their_axes():
    shapes, axes = shapes_and_axes(build(CONFIGS["dropless, biases"], dtype="float32"))
    assert axes == {
        "router": {"kernel": ("embed", "router")},
        "up": {"kernel": ("expert", "embed", "mlp"), "bias": ("expert", "mlp")},
        "down": {"kernel": ("expert", "mlp", "embed"), "bias": ("expert", "embed")},
    }
    assert shapes["up"]["kernel"].shape == (8, 16, 24) and shapes["down"]["kernel"].shape == (8, 24, 16)
    assert set(shapes_and_axes(build(CONFIGS["dropless"], dtype="float32"))[0]) == {"router", "gate", "up", "down"}


def test_parameters_of_routers_with_biases():
    v3, v3_axes = shapes_and_axes(build(CONFIGS["V3"], dtype="bfloat16"))
    assert v3["balance_bias"].shape == (8,) and v3_axes["balance_bias"] == ("balance",)
    assert v3["balance_bias"].dtype == jnp.float32  # small steps, which bfloat16 would lose
    assert v3["up"]["kernel"].shape == (8, 16, 8) and v3["up"]["kernel"].dtype == jnp.bfloat16
    oss, axes = shapes_and_axes(build(CONFIGS["GPT-OSS"], dtype="float32"))
    assert oss["router"]["bias"].shape == (8,) and axes["router"]["bias"] == ("router",)


def test_the_load_is_counted_over_the_whole_batch(x64):
    """The gradient of each layer's balance bias: whole numbers, the same in one batch, in four, and stage by stage."""
    moe = dict(num_experts=8, top_k=2, scores="sigmoid", balance_bias=True, balance_loss=0.1, dense_layers=1)
    cfg = Config(model=decoder(num_layers=3, moe=moe))
    batch, objective = packed(8, 8), LanguageObjective.make(cfg)
    found = {}
    for name, accumulation, sizes in (("one", 1, {}), ("four", 4, {}), ("stages", 2, dict(stage=2, expert=2))):
        layout = mesh_layout(**sizes) if sizes else Layout()
        model = build_decoder(cfg.model, layout, "float64")
        gradient = functools.partial(step.gradients, model, objective, layout=layout, seed=0, step=0)
        gradient = functools.partial(gradient, accumulation=accumulation)
        grads, _, _ = jax.jit(gradient, compiler_options=QUICK)(draw(model), batch)
        found[name] = np.asarray(grads["stack"]["blocks"]["moe"]["balance_bias"])
    assert found["one"].shape == (2, 8) and (found["one"] == found["one"].round()).all() and found["one"].any(-1).all()
    assert not found["one"].sum(-1).any()
    choices = 2 * (batch["segment_ids"] != 0).sum()
    assert ((found["one"] + choices) % 8 == 0).all()  # 8 times a number of choices
    for name in ("four", "stages"):
        np.testing.assert_array_equal(found[name], found["one"])


def test_a_balance_bias_evens_the_load():
    """A router that sends all to two experts, and nothing that trains but its bias: after some steps all are used."""
    moe = dict(num_experts=8, top_k=2, scores="sigmoid", balance_bias=True, balance_loss=0.0)
    cfg = Config(model=decoder(num_layers=1, moe=moe))
    model, batch, objective = build_decoder(cfg.model, Layout(), "float32"), packed(8, 16), LanguageObjective.make(cfg)
    params = draw(model, scale=0.02)
    bias = np.zeros((1, 8), np.float32)
    bias[0, 2:4] = 0.2
    params["stack"]["blocks"]["moe"]["balance_bias"] = jnp.asarray(bias)
    settings = OptimConfig(freeze=("(?!.*balance_bias).*",))
    tx = optim.make(settings, 40, model.shapes(), model.axes(), balance_rate=0.01)
    gradient = functools.partial(step.gradients, model, objective, layout=Layout(), seed=0, step=0)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def update(params, state):
        grads = gradient(params, batch)[0]
        changes, state = tx.update(grads, state, params)
        above = grads["stack"]["blocks"]["moe"]["balance_bias"].max() / (2 * (batch["segment_ids"] != 0).sum())
        return optax.apply_updates(params, changes), state, 1 + above  # the busiest expert's load, relative to the mean

    state, loads = tx.init(params), []
    for _ in range(40):
        params, state, load = update(params, state)
        loads.append(float(load))
    assert loads[0] > 3.9 and max(loads[-5:]) < 2.5, loads


def test_experts_start_as_dense_layers_do_and_differ():
    cfg = decoder(moe=dict(num_experts=8), init="torch", residual_init_scale=False)
    make = jax.jit(build(cfg, dtype="float32").init, compiler_options=QUICK)
    params = nn.unbox(make(jax.random.key(0), jnp.zeros((1, 1, EMBED))))["params"]
    for name, fan_in in (("up", 16), ("gate", 16), ("down", 24)):
        kernel = np.abs(params[name]["kernel"])
        np.testing.assert_allclose(kernel.max((1, 2)), fan_in**-0.5, rtol=0.05)
        assert len(np.unique(kernel[:, 0, 0])) == 8


@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_scanned_and_recomputed_layers_give_what_each_alone_gives(x64, name):
    """Two layers under nn.scan and nn.remat, on a mesh, against the two one after the other on one device."""
    x, dy, segments = batch()
    cfg = CONFIGS[name]

    class Layer(nn.Module):
        layout: Layout

        @nn.compact
        def __call__(self, x, segments):
            y, routing = MoE(cfg, self.layout, Precision(*[jnp.dtype("float64")] * 2), name="moe")(x, segments)
            return x + y, routing

    def stack(layout):
        remat = nn.remat(Layer, prevent_cse=False)
        return nn.scan(
            remat, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(layout)  # fmt: skip

    rng = np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(stack(Layout()).init, jax.random.key(0), x, segments))
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), shapes)

    def loss(apply):
        def value(params, x):
            y, routing = apply(params, x)
            return (y * dy).sum() + routing.z.sum(), routing

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), compiler_options=QUICK)

    def one_by_one(params, x):
        found = []
        for layer in range(2):
            x, routing = Layer(Layout()).apply(jax.tree.map(lambda leaf, i=layer: leaf[i], params), x, segments)
            found.append(routing)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    scanned = stack(mesh_layout(fsdp=2, expert=2, tensor=2))
    found = loss(lambda params, x: scanned.apply(params, x, segments))(params, x)
    assert_close(found, loss(one_by_one)(params, x), atol=1e-10)


def count(jaxpr, primitive):
    """How often a jaxpr and those inside of it apply a primitive."""
    found = sum(equation.primitive.name == primitive for equation in jaxpr.eqns)
    for equation in jaxpr.eqns:
        is_jaxpr = lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")  # noqa: E731
        inner = filter(is_jaxpr, jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr))
        found += sum(count(getattr(sub, "jaxpr", sub), primitive) for sub in inner)
    return found


def products(module, primitive, names):
    """How many there are in the gradient of a layer that keeps the tensors `names`."""

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
    def layer(params, x):
        return module.apply({"params": params}, x)[0]

    shapes, _ = shapes_and_axes(module)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, EMBED), jnp.float32)
    gradient = jax.make_jaxpr(jax.grad(lambda params, x: jnp.square(layer(params, x)).sum(), (0, 1)))(shapes, x)
    return count(gradient.jaxpr, primitive)


KEPT = {("mlp_up", "mlp_gate"): 2, ("mlp_output",): 1, ("mlp_up", "mlp_gate", "mlp_output"): 3}


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2, expert=4)], ids=["one device", "fsdp, expert"])
@pytest.mark.parametrize("factor, primitive", [(0.0, "ragged_dot_general"), (1.0, "dot_general")])
def test_products_whose_results_are_kept_are_not_computed_again(factor, primitive, sizes):
    """Of an expert's three products: forward once, backward twice each, and again what the policy does not keep."""
    cfg = decoder(activation="swiglu", moe=dict(num_experts=8, capacity_factor=factor))
    module = build(cfg, mesh_layout(**sizes) if sizes else None, "float32")
    all_again = products(module, primitive, ())
    assert factor or all_again == 12
    for names, saved in KEPT.items():
        assert all_again - products(module, primitive, names) == saved, names


@pytest.mark.parametrize("name", ["dropless", "capacity"])
def test_routing_is_decided_in_float32_and_outputs_keep_their_dtype(name):
    x, _, segments = batch()
    module = build(CONFIGS[name], mesh_layout(expert=4, tensor=2), "bfloat16")
    params = build(CONFIGS[name], dtype="bfloat16").init(jax.random.key(0), jnp.zeros((1, 1, EMBED), jnp.bfloat16))
    run = jax.jit(lambda x: module.apply(params, x, segments), compiler_options=QUICK)
    y, routing = run(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and routing.z.dtype == routing.balance.dtype == routing.dropped.dtype == jnp.float32
    assert np.isfinite(np.asarray(y, np.float32)).all()
