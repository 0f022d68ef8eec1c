"""Published sizes lower for up to 512 devices that are not there, and the partitioner moves what the rules imply.

`tests/collectives.py` compiles each cell in a process of its own with 512 fake devices; the counts by kind and mesh
axes are golden files, made by `tests/golden/make_collectives.py` for each minor version of jax.
"""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import collectives
import jax
import pytest
from collectives import CELLS, QUICK, SLOW, Collective, cell_config, counts, measure

from llm_jax.models import registry
from llm_jax.precision import Precision
from llm_jax.sharding import abstract_layout, path_name
from llm_jax.training.lower import lower_step

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import make_collectives

LARGE = 2**18  # numbers: 1 MiB in float32; smaller arrays move as they like


def cells(axis: str = ""):
    """Parameters of a test: the cells that name this axis. Slow ones are marked."""
    marks = lambda cell: [pytest.mark.slow] if cell in SLOW else []  # noqa: E731
    return [pytest.param(cell, marks=marks(cell), id=cell) for cell in CELLS if axis in cell]


def moved(cell: str, kind: str, axis: str) -> list[Collective]:
    """The collectives of one kind that go over this axis, be it with others."""
    return [one for one in measure(cell)["collectives"] if one.kind == kind and axis in one.axes.split("+")]


def activations(cell: str, kind: str, axis: str) -> list[Collective]:
    """Likewise, those of large activations inside a block."""
    found = moved(cell, kind, axis)
    return [one for one in found if one.size >= LARGE and ("/blocks/" in one.name or "/Block/" in one.name)]


def large_matrices(cell: str) -> Counter[int]:
    """Of one layer, parameters of 1 MiB or more: how many numbers a device gathers over fsdp, and how often."""
    cfg, devices = cell_config(cell)
    layout = abstract_layout(cfg.mesh, devices)
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    leaves = jax.tree_util.tree_leaves_with_path(model.shapes()["stack"])
    places = jax.tree.leaves(layout.parameter_shardings(model.shapes(), model.axes())["stack"])
    sizes = Counter()
    for (_, leaf), place in zip(leaves, places, strict=True):
        if leaf.size // cfg.model.num_layers >= LARGE:
            sizes[math.prod(place.shard_shape(leaf.shape)[1:]) * cfg.mesh.fsdp] += 1
    return sizes


# --------------------------------------------------------------------------------- without devices, in this process


@pytest.mark.parametrize("cell", cells())
def test_steps_lower_without_devices(cell):
    """For a TPU, on an abstract mesh: the program says the mesh and how each argument lies on it."""
    cfg, devices = cell_config(cell)
    text = lower_step(cfg, abstract_layout(cfg.mesh, devices), "tpu").as_text()
    for axis in ("data", "fsdp", "expert", "sequence", "tensor", "stage"):
        assert re.search(rf'sdy\.mesh .*"{axis}"={getattr(cfg.mesh, axis)}\b', text), axis
    assert '{"fsdp"}' in text and ("tf.aliasing_output" in text or "jax.buffer_donor" in text)  # split, and donated


@pytest.mark.parametrize("cell", CELLS)
def test_no_large_parameter_is_replicated(cell):
    """None of 1 MiB or more, counted by the layer, on the cell's own mesh; nor its copies in the optimizer."""
    cfg, devices = cell_config(cell)
    layout = abstract_layout(cfg.mesh, devices)
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    names = jax.tree.leaves(model.axes(), is_leaf=lambda node: isinstance(node, tuple))
    placed = [
        jax.tree.leaves(layout.parameter_shardings(model.shapes(), model.axes(), rules))
        for rules in (layout.parameter_rules, layout.optimizer_rules)
    ]
    leaves = jax.tree_util.tree_leaves_with_path(model.shapes())
    checked = 0
    for (path, leaf), axes, *places in zip(leaves, names, *placed, strict=True):
        if leaf.size // (leaf.shape[0] if axes[0] == "layers" else 1) >= LARGE:
            checked += 1
            for place in places:
                share = math.prod(place.shard_shape(leaf.shape)) / leaf.size
                assert share <= 8 / devices, (path_name(path), place.spec)  # over every axis but data, at most 8 here
    assert checked >= 9


# ------------------------------------------------------------------------------------- what the partitioner makes


@pytest.mark.parametrize("cell", cells())
def test_collectives_are_as_kept(cell):
    file = make_collectives.golden_file()
    if not file.exists():
        pytest.skip(f"no counts were kept for this jax: {file.name}")
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert counts(measure(cell)["collectives"]) == kept[cell], "on purpose? python tests/golden/make_collectives.py"


def test_every_cell_is_kept():
    for file in Path(make_collectives.__file__).parent.glob("collectives_jax_*.json"):
        assert json.loads(file.read_text(encoding="utf-8")).keys() == CELLS.keys(), file


@pytest.mark.parametrize("cell", cells())
def test_nothing_is_replicated_in_despair(cell):
    """XLA warns of an "involuntary full rematerialization" where it cannot go from one split to another."""
    assert measure(cell)["warnings"] == []


@pytest.mark.parametrize("cell", cells("fsdp"))
def test_weights_are_gathered_and_their_gradients_scattered_over_fsdp(cell):
    """Each large matrix of a layer: gathered forward, again for the recomputation, perhaps backward; scattered once."""
    matrices = large_matrices(cell)
    assert matrices.total() == 7  # four of attention, three of the MLP or of all the experts
    gathered = Counter(one.size for one in moved(cell, "all-gather", "fsdp") if one.axes == "fsdp")
    scattered = Counter(one.size for one in moved(cell, "reduce-scatter", "fsdp") if one.axes == "fsdp")
    for size, number in matrices.items():
        assert 2 * number <= gathered[size] <= 3 * number
        assert scattered[size] == number


@pytest.mark.parametrize("cell", cells("data"))
def test_gradients_are_summed_inside_a_slice_first(cell):
    """Over fsdp, inside, where each device keeps its part; then these parts over data, across slices or nodes."""
    fsdp = measure(cell)["mesh"]["fsdp"]
    across = Counter(one.size * fsdp for one in moved(cell, "all-reduce", "data") if one.axes == "data")
    matrices = large_matrices(cell)
    assert {size: across[size] for size in matrices} == matrices
    blocks = [one for one in measure(cell)["collectives"] if "/stack/" in one.name and len(one.shape) > 1]
    assert {one.axes for one in blocks if "data" in one.axes} == {"data"}


@pytest.mark.parametrize("cell", cells("data"))
def test_so_are_those_of_the_tables(cell):
    large = [one for one in measure(cell)["collectives"] if one.size >= LARGE and "data" in one.axes]
    assert {one.axes for one in large} == {"data"}


@pytest.mark.parametrize("cell", cells("tensor"))
def test_a_tensor_axis_gathers_and_scatters_a_block_twice(cell):
    """Tokens of the residual stream are split over it: in front of attention and MLP gathered, behind scattered."""
    for kind in ("all-gather", "reduce-scatter"):
        forward = [one.axes for one in activations(cell, kind, "tensor") if not one.backward]
        assert forward == ["tensor"] * 2, kind
    assert activations(cell, "all-reduce", "tensor") == []


@pytest.mark.parametrize("cell", cells("tensor"))
def test_a_tensor_axis_keeps_the_tables_split(cell):
    cfg, _ = cell_config(cell)
    table = cfg.model.vocab_size * cfg.model.embed_dim
    assert [one for one in measure(cell)["collectives"] if "tensor" in one.axes and one.size == table] == []


@pytest.mark.parametrize("cell", cells("ring"))
def test_ring_attention_passes_keys_on_and_gathers_no_activation(cell):
    turns = moved(cell, "collective-permute", "sequence")
    assert turns and {one.axes for one in turns} == {"sequence"}
    assert activations(cell, "all-gather", "sequence") == []


@pytest.mark.parametrize("cell", cells("all_to_all"))
def test_all_to_all_attention_trades_tokens_for_heads_and_gathers_no_activation(cell):
    traded = [one for one in moved(cell, "all-to-all", "sequence") if one.size >= LARGE]
    assert traded and {one.axes for one in traded} == {"sequence"}
    assert activations(cell, "all-gather", "sequence") == []


@pytest.mark.parametrize("cell", cells("expert"))
def test_tokens_go_to_experts_and_no_expert_is_gathered(cell):
    traded = [one for one in moved(cell, "all-to-all", "expert") if one.size >= LARGE]
    assert [one.axes for one in traded] == ["expert"] * 6  # there and back: forward, again when recomputed, backward
    assert moved(cell, "all-gather", "expert") == []


@pytest.mark.parametrize("cell", cells("stage"))
def test_stages_hand_activations_on_and_keep_their_weights(cell):
    handed = moved(cell, "collective-permute", "stage")
    assert [one.backward for one in handed] == [False, True] and {one.axes for one in handed} == {"stage"}
    assert [one for one in moved(cell, "all-gather", "stage") if one.size >= LARGE] == []


# -------------------------------------------------------------------------------------------- reading a module

MODULE = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %w = bf16[8,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, metadata={op_name="f/stack/q"}
  %g = f32[8,16]{1,0} all-reduce(%y), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  %c = f32[8,16]{1,0} copy(%g)
  %s = f32[2,16]{1,0} dynamic-slice(%c, %i, %z), dynamic_slice_sizes={2,16}
  ROOT %t = (s32[], f32[4,8]) tuple(%j, %s)
}

%cond (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[2,16] {
  %loop = (s32[], f32[4,8]) while(%init), condition=%cond, body=%body
  %n = f32[] all-reduce(%norm), replica_groups=[1,8]<=[8], to_apply=%sum
  %all = f32[16]{0} all-reduce(%b), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%sum
  ROOT %m = f32[2,16]{1,0} collective-permute(%all), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
}
"""


def test_a_module_is_read():
    """Four shards of fsdp by two of tensor: device 2 f + t."""
    found = collectives.collectives(MODULE, {"fsdp": 4, "tensor": 2})
    assert [(one.kind, one.axes, one.shape, one.dtype, one.loop) for one in found] == [
        ("all-gather", "fsdp", (8, 16), "bf16", True),
        ("reduce-scatter", "fsdp", (8, 16), "f32", True),
        ("all-reduce", "tensor", (16,), "f32", False),
        ("collective-permute", "fsdp", (2, 16), "f32", False),
    ]
    assert counts(found) == {
        "all-gather": {"fsdp": 1}, "reduce-scatter": {"fsdp": 1}, "all-reduce": {"tensor": 1},
        "collective-permute": {"fsdp": 1},
    }  # fmt: skip


def test_groups_in_every_spelling():
    expected = [[0, 2, 4, 6], [1, 3, 5, 7]]
    for text in (
        "{{0,2,4,6},{1,3,5,7}}", "[2,4]<=[4,2]T(1,0)", "mesh['a'=4,'b'=2] {'a'}",
        "mesh['b'=2,'a'=4], device_ids=([4,2]T(1,0)) {'a'}",
    ):  # fmt: skip
        assert collectives.replica_groups(f"replica_groups={text}, to_apply=%sum") == expected


def test_the_quick_cells_are_cells():
    assert set(QUICK) | set(SLOW) == set(CELLS) and len(QUICK) == 2
