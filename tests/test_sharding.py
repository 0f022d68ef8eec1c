"""The layout: rules that raise, literal shards, and the specs of a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import build, decoder, mesh_layout

from llm_jax.config import MeshConfig
from llm_jax.errors import ConfigError, UserError
from llm_jax.sharding import (
    ACTIVATION_RULES,
    PARAMETER_RULES,
    Layout,
    abstract_layout,
    bytes_a_device,
    change_rules,
    make_layout,
    mesh_shape,
    path_name,
    slices_of,
)

# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layout", [Layout(), mesh_layout(2, 2, 2)], ids=["no mesh", "mesh"])
def test_a_misspelt_axis_is_an_error_with_the_nearest_name(layout):
    """Also without a mesh, so that it shows on the first machine."""
    with pytest.raises(ValueError, match="logical axis 'lenght' .* Did you mean 'length'?"):
        layout(jnp.zeros((4, 4)), "batch", "lenght")
    with pytest.raises(ValueError, match="logical axis 'mpl' of .*'embed', 'mpl'.* Did you mean 'mlp'?"):
        layout.parameter_shardings({"a": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, {"a": ("embed", "mpl")})
    with pytest.raises(ValueError, match="logical axis 'qqqqqq'"):
        layout(jnp.zeros(4), "qqqqqq")


def test_the_number_of_axes_is_the_rank():
    with pytest.raises(ValueError, match=r"shape \(4, 4\) was given 3 logical axes"):
        Layout()(jnp.zeros((4, 4)), "batch", "length", "embed")


def test_one_mesh_axis_splits_one_axis():
    layout = mesh_layout(fsdp=2, parameter_rules=("mlp=fsdp",))
    with pytest.raises(ConfigError, match=r"\('embed', 'mlp'\) would be split over \['fsdp', 'fsdp'\]"):
        layout.parameter_shardings({"a": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, {"a": ("embed", "mlp")})


def test_an_indivisible_parameter_is_named():
    shapes = {"block": {"kernel": jax.ShapeDtypeStruct((6, 4), jnp.float32)}}
    axes = {"block": {"kernel": ("embed", "mlp")}}
    message = r"block/kernel of shape \(6, 4\) .* axis 'embed' of 6 is not .* the 4 parts"
    with pytest.raises(ConfigError, match=message):
        mesh_layout(fsdp=4).parameter_shardings(shapes, axes)
    mesh_layout(data=4).parameter_shardings(shapes, axes)


# ----------------------------------------------------------------------------------------------------- rules


def test_changes_of_rules():
    rules = dict(change_rules(PARAMETER_RULES, ("embed=data+fsdp", "mlp="), "mesh.parameter_rules"))
    assert rules == dict(PARAMETER_RULES) | {"embed": ("data", "fsdp"), "mlp": ()}
    assert change_rules(PARAMETER_RULES, (), "mesh.parameter_rules") == PARAMETER_RULES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("embd=fsdp", "did you mean 'embed'?"),
        ("embed", "does not read as LOGICAL_AXIS=MESH_AXIS"),
        ("", "does not read as"),
        ("embed=model", "names the mesh axis 'model'; there are stage, data, fsdp, expert, sequence, tensor"),
    ],
)
def test_bad_changes_are_refused_with_their_key(change, message):
    with pytest.raises(ConfigError) as error:
        make_layout(MeshConfig(optimizer_rules=(change,)))
    assert "mesh.optimizer_rules" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage=", "mesh.stage alone"),
        ("length=sequence+tensor", "would be split over"),
        ("residual_length=data", "would be split over"),
        ("heads=stage", "within a stage"),
        ("expert=tensor", "would be split over"),
    ],
)
def test_rules_that_no_activation_could_follow_are_refused_at_once(change, message):
    with pytest.raises(ConfigError, match=message):
        abstract_layout(MeshConfig(activation_rules=(change,)), 8)


def test_the_optimizer_follows_the_parameters_unless_told_otherwise():
    layout = mesh_layout(2, 4, parameter_rules=("embed=",))
    assert dict(layout.parameter_rules)["embed"] == dict(layout.optimizer_rules)["embed"] == ()
    layout = mesh_layout(2, 4, parameter_rules=("embed=",), optimizer_rules=("embed=data+fsdp",))
    shapes, axes = {"a": jax.ShapeDtypeStruct((8, 4), jnp.float32)}, {"a": ("embed", "mlp")}
    assert layout.parameter_shardings(shapes, axes)["a"].spec == P(None, ("tensor",))
    of_optimizer = layout.parameter_shardings(shapes, axes, layout.optimizer_rules)
    assert of_optimizer["a"].spec == P(("data", "fsdp"), ("tensor",))


def test_every_parameter_axis_has_an_activation_rule_where_it_is_gathered():
    """Embedding tables are constrained by the activation rules when they are used."""
    for axis in ("vocab", "position", "buckets", "embed", "heads"):
        assert axis in dict(PARAMETER_RULES) and axis in dict(ACTIVATION_RULES)


# ------------------------------------------------------------------------------------------------------ mesh


SIZES = {"stage": 1, "data": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}


def test_mesh_sizes_and_axis_types():
    assert mesh_shape(MeshConfig(), 8) == (1, 8, 1, 1, 1, 1)
    assert mesh_shape(MeshConfig(data=2, fsdp=-1, tensor=2), 8) == (1, 2, 2, 1, 1, 2)
    layout = make_layout(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(layout.mesh.shape) == SIZES | {"data": 2, "fsdp": 2, "tensor": 2}
    assert layout.mesh.axis_types == (AxisType.Auto,) * 6  # under Explicit, Linen's products raise
    assert layout.num_devices == 8 and layout.batch_shards == 4
    assert Layout().num_devices == Layout().batch_shards == 1 and Layout().replicated is None


class Device:
    """What the mesh asks of a device."""

    def __init__(self, id, slice_index=None, process_index=0, platform="tpu"):
        self.id, self.process_index, self.platform = id, process_index, platform
        self.device_kind, self.coords = "fake", None
        if slice_index is not None:
            self.slice_index = slice_index


def ids(parts):
    return [[device.id for device in part] for part in parts]


def test_devices_are_told_apart_by_slice_then_by_process():
    by_slice = [Device(i, slice_index=i % 2) for i in range(4)]
    assert ids(slices_of(by_slice, 2)) == [[0, 2], [1, 3]]
    by_node = [Device(i, process_index=i // 2, platform="gpu") for i in range(8)]
    assert ids(slices_of(by_node, 4)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert ids(slices_of(by_node, 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]  # two processes a node
    assert ids(slices_of([Device(i, platform="cpu") for i in range(4)], 2)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("devices", "count", "words"),
    [
        ([Device(i, slice_index=i // 2) for i in range(4)], 4, "asks for 4 slices"),
        ([Device(i) for i in range(4)], 2, "form 1 of 4"),
        ([Device(i, slice_index=i // 3) for i in range(4)], 2, "form 2 of 3, 1"),
    ],
)
def test_slices_that_are_not_there_are_refused(devices, count, words):
    with pytest.raises(ConfigError, match="mesh.across_slices") as error:
        slices_of(devices, count)
    assert words in str(error.value)


def test_inner_parts_of_an_axis_lie_in_one_slice():
    """data 4 = 2 slices x 2, fsdp 2 within each: devices 0-3 form the first slice."""
    layout = mesh_layout(data=4, fsdp=2, across_slices=("data=2",))
    found = [[device.id for device in row] for row in layout.mesh.devices[0, :, :, 0, 0, 0]]
    assert {i for row in found[:2] for i in row} == {0, 1, 2, 3}
    assert {i for row in found[2:] for i in row} == {4, 5, 6, 7}
    layout = mesh_layout(data=2, fsdp=4, across_slices=("fsdp=2",))
    found = [[device.id for device in row] for row in layout.mesh.devices[0, :, :, 0, 0, 0]]
    for row in found:  # each row of fsdp goes over both slices, half in each
        assert len(set(row[:2]) & {0, 1, 2, 3}) == 2 and len(set(row[2:]) & {4, 5, 6, 7}) == 2


def test_layouts_are_values():
    assert make_layout(MeshConfig()) == make_layout(MeshConfig())
    assert hash(mesh_layout(2, 2, 2)) == hash(mesh_layout(2, 2, 2))
    assert mesh_layout(2, 2, 2) != mesh_layout(2, 4) != mesh_layout(2, 4, parameter_rules=("embed=",))


def test_without_a_mesh_nothing_changes():
    x = jnp.arange(4.0).reshape(2, 2)
    assert Layout()(x, "batch", "length") is x
    assert Layout().parameter_shardings({"a": x}, {"a": ("embed", "mlp")}) == {"a": None}
    assert Layout().batch_rows(3).tolist() == [0, 1, 2]
    assert Layout().put_batch({"a": np.arange(3)}, 3)["a"].tolist() == [0, 1, 2]


def test_a_layout_for_a_machine_that_is_not_there():
    layout = abstract_layout(MeshConfig(fsdp=512, tensor=8), 8192)
    assert dict(layout.mesh.shape) == SIZES | {"data": 2, "fsdp": 512, "tensor": 8}
    shapes = {"a": jax.ShapeDtypeStruct((1024, 64), jnp.float32)}
    shardings = layout.parameter_shardings(shapes, {"a": ("embed", "mlp")})
    leaf = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=shardings["a"])
    assert bytes_a_device({"a": leaf}) == 1024 * 64 * 4 // 512 // 8


# ------------------------------------------------------------------------------------------------ constraints


def test_constraints_split_arrays_as_the_rules_say():
    layout = mesh_layout(2, 2, 2)
    x = jnp.zeros((4, 3, 6))
    y = jax.jit(lambda x: layout(x, "batch", "length", "mlp"))(x)
    assert y.sharding.shard_shape(y.shape) == (1, 3, 3)
    assert jax.jit(lambda x: layout(x, "batch", "length", None))(x).sharding.shard_shape(y.shape) == (1, 3, 6)


def test_batch_rows_and_pieces():
    layout = mesh_layout(2, 2, 2)
    assert layout.batch_rows(8).tolist() == list(range(8))
    rows = np.arange(24).reshape(8, 3)
    batch = layout.put_batch({"tokens": rows, "weights": np.arange(8.0), "pixels": np.zeros((8, 2, 2, 1))}, 8)
    np.testing.assert_array_equal(batch["tokens"], rows)
    assert batch["pixels"].sharding.spec == P(("data", "fsdp", "expert"), None, None, None)
    pieces = {shard.device.id: shard.data.tolist() for shard in batch["weights"].addressable_shards}
    by_place = layout.mesh.devices[0, :, :, 0, 0]  # (data, fsdp, tensor): tensor neighbours hold the same rows
    for data in range(2):
        for fsdp in range(2):
            expected = [float(2 * (2 * data + fsdp)), float(2 * (2 * data + fsdp) + 1)]
            for tensor in range(2):
                assert pieces[by_place[data, fsdp, tensor].id] == expected


def test_what_a_row_has_of_its_texts_is_not_split_over_its_tokens():
    layout = mesh_layout(data=2, sequence=4)
    batch = layout.put_batch({"tokens": np.zeros((2, 8)), "starts": np.zeros((2, 3)), "labels": np.zeros((2, 3, 2))}, 2)
    assert {name: array.sharding.shard_shape(array.shape) for name, array in batch.items()} == {
        "tokens": (1, 2), "starts": (1, 3), "labels": (1, 3, 2)
    }  # fmt: skip


def test_a_process_must_give_its_own_rows():
    """JAX takes any number of rows and gives wrong sums."""
    message = "'tokens' has 4 rows on process 0, which must supply 8 of the global batch's 8"
    with pytest.raises(UserError, match=message):
        mesh_layout(8).put_batch({"tokens": np.zeros((4, 2))}, 8)
    with pytest.raises(UserError, match="'tokens' has 4 rows"):
        Layout().put_batch({"tokens": np.zeros((4, 2))}, 8)


# ------------------------------------------------------------------------------------------------ whole models


def test_specs_of_a_whole_model():
    cfg = decoder(embed_dim=16, num_heads=4, bias="all", norm="layernorm", positions="learned", tie_embeddings=False)
    layout = mesh_layout(2, 2, 2)
    model = build(cfg, layout)
    shardings = layout.parameter_shardings(model.shapes(), model.axes())
    specs = {path_name(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    stage, fsdp, tensor, vocab = ("stage",), ("fsdp",), ("tensor",), ("tensor", "stage")
    block = {
        "attention/key/bias": P(stage, tensor),
        "attention/key/kernel": P(stage, fsdp, tensor),
        "attention/out/bias": P(stage, fsdp),
        "attention/out/kernel": P(stage, tensor, fsdp),
        "attention/query/bias": P(stage, tensor),
        "attention/query/kernel": P(stage, fsdp, tensor),
        "attention/value/bias": P(stage, tensor),
        "attention/value/kernel": P(stage, fsdp, tensor),
        "attention_norm/bias": P(stage, None),
        "attention_norm/scale": P(stage, None),
        "mlp/down/bias": P(stage, fsdp),
        "mlp/down/kernel": P(stage, tensor, fsdp),
        "mlp/gate/bias": P(stage, tensor),
        "mlp/gate/kernel": P(stage, fsdp, tensor),
        "mlp/up/bias": P(stage, tensor),
        "mlp/up/kernel": P(stage, fsdp, tensor),
        "mlp_norm/bias": P(stage, None),
        "mlp_norm/scale": P(stage, None),
    }
    assert specs == {f"stack/blocks/{name}": spec for name, spec in block.items()} | {
        "embedding/table": P(vocab, fsdp),
        "positions/table": P(None, fsdp),
        "final_norm/bias": P(None),
        "final_norm/scale": P(None),
        "head/kernel": P(fsdp, vocab),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(scan_layers=False, qk_norm="head", num_kv_heads=2),
        dict(positions="relative", norm_placement="post"),
    ],
    ids=str,
)
def test_every_parameter_has_axes_and_a_share(changes):
    """What fsdp and tensor split is all but the vectors and the relative biases."""
    layout = mesh_layout(1, 4, 2)
    model = build(decoder(embed_dim=32, **changes), layout)
    shapes = model.shapes()
    shardings = layout.parameter_shardings(shapes, model.axes())
    for (path, shape), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        share = shape.size / np.prod(sharding.shard_shape(shape.shape))
        expected = 1 if "norm" in path_name(path) else 2 if "relative" in path_name(path) else 8
        assert share == expected, path_name(path)


def test_a_change_of_rules_makes_another_model():
    """The layout is part of the module, so a jitted function of it is traced again."""
    layout = mesh_layout(2, 2, 2)
    other = dataclasses.replace(layout, activation_rules=(*ACTIVATION_RULES[:-1], ("buckets", ("tensor",))))
    assert build(decoder(), layout) != build(decoder(), other)
    assert build(decoder(), layout) == build(decoder(), layout)
    assert hash(build(decoder(), layout)) == hash(build(decoder(), layout))
