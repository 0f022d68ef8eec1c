"""Meshes that presets choose for machines, literally; the arithmetic behind them by hand; the guide's numbers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import mesh_tables
import pytest
from test_published import PUBLISHED, size_of

from configs import machines
from configs.machines import fit, machine
from llm_jax import sharding
from llm_jax.config import check, check_devices, load
from llm_jax.config.pipeline import bubble
from llm_jax.errors import ConfigError
from llm_jax.kernels.experts import Bank, dropless
from llm_jax.metrics.hardware import PEAK_FLOPS


def test_machines_agree_with_the_table_of_peaks():
    for name, row in machines.MACHINES.items():
        chip = dict(zip(machines.COLUMNS, row, strict=True))
        flops, devices = PEAK_FLOPS[chip["kind"]]
        assert chip["flops"] == flops, name
        assert chip["devices"] == devices or name == "v4"  # two, or one where the chip's cores work as one (Megacore)


@pytest.mark.parametrize(
    ("name", "devices", "domain"),
    [("v5p-64", 32, 32), ("v5e-256", 256, 256), ("v5e-256x4", 1024, 256), ("tpu7x-128", 128, 128), ("v4-128", 64, 64),
     ("v5p-64x2", 64, 32), ("h100x8", 8, 8), ("h100x64", 64, 8), ("a100x4", 4, 4)],
)  # fmt: skip
def test_a_machines_name_says_how_many(name, devices, domain):
    found = machine(name)
    assert (found["devices"], found["domain"]) == (devices, domain)


@pytest.mark.parametrize(
    "name", ["v5q-64", "h100", "h100-8", "v5px8", "v5p-", "v5p-0", "v5p-6x", "v5p-2x2x2", "x", "v5p-64 "]
)
def test_an_unknown_machine_is_refused_with_the_list(name):
    with pytest.raises(ConfigError, match=r"no machine .*v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200.*v5p-64"):
        load(f"llama3/8b:{name}")


@pytest.mark.parametrize(
    ("name", "match"), [("v5p-63", "TensorCores, two a chip"), ("h100x12", "nodes of 8"), ("h100x8x2", "nodes of 8")]
)
def test_half_a_chip_or_node_is_refused(name, match):
    with pytest.raises(ConfigError, match=match):
        load(f"llama3/8b:{name}")


def test_a_machine_that_is_too_small_is_refused():
    with pytest.raises(ConfigError, match="405.9B parameters take 756 of each device's 75 GiB"):
        load("llama3/405b:h100x8")


@pytest.mark.parametrize(
    ("spec", "mesh", "accumulation"),
    [
        ("llama3/8b:h100x8", dict(data=1, fsdp=8), 16),
        ("llama3/8b:h100x64", dict(data=8, fsdp=8, across_slices=("data=8",)), 2),
        ("llama3/8b:v5p-64", dict(data=1, fsdp=32), 2),
        ("llama3/8b:v5e-256x4", dict(data=4, fsdp=256, across_slices=("data=4",)), 1),
        ("llama3/70b:h100x64", dict(data=1, fsdp=64, across_slices=("fsdp=8",)), 8),
        ("llama3/70b:v6e-64", dict(data=1, fsdp=16, tensor=4), 64),
        ("llama3/405b:v4-1024", dict(data=1, fsdp=128, tensor=4), 16),
        ("llama3/405b:v5p-1024", dict(data=1, fsdp=512), 4),
        ("llama2/7b:a100x64", dict(data=8, fsdp=8, across_slices=("data=8",)), 1),
        ("mixtral/8x7b:h100x64", dict(data=1, fsdp=64, across_slices=("fsdp=8",)), 1),
        ("mixtral/8x7b:v5p-64", dict(data=1, fsdp=32), 2),
        ("mixtral/8x7b:tpu7x-512", dict(data=1, fsdp=256, expert=2), 1),
        ("llama3/8b", dict(data=1, fsdp=-1), 1),
    ],
)
def test_meshes_are_these(spec, mesh, accumulation):
    cfg = load(spec)
    found = {key: getattr(cfg.mesh, key) for key in ("data", "fsdp", "expert", "tensor", "across_slices")}
    assert found == dict(data=1, fsdp=1, expert=1, tensor=1, across_slices=()) | mesh
    assert cfg.train.accumulation == accumulation
    assert cfg.mesh.activation_rules == (("residual_length=sequence+tensor",) if cfg.mesh.tensor > 1 else ())


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("place", mesh_tables.NAMES)
def test_a_preset_is_a_config_that_can_run(name, place):
    """Every shipped size on every machine of the guide: a mesh that fits the devices and the batch, or a refusal."""
    try:
        cfg = load(f"{name}:{place}")
    except ConfigError as error:
        assert "does not hold this run" in str(error)
        return
    check(cfg)
    check_devices(cfg, machine(place)["devices"])
    assert cfg.eval.batch_size == 0  # evaluation takes a micro-batch at a time, so it fits where a step does


@pytest.mark.parametrize("kind", mesh_tables.CLASSES)
def test_what_is_left_of_the_memory_holds_the_activations(kind):
    """The presets' promise, from the bytes of the state, of whole weights and of the rows; and no fewer pieces do."""
    size, rows = mesh_tables.CLASSES[kind]
    chosen = {place: choose(place, size, rows) for place in mesh_tables.NAMES}
    assert any(chosen.values())
    for place, found in chosen.items():
        if found is None:
            continue
        one, mesh, pieces = machine(place), found["mesh"], found["train"]["accumulation"]
        expert, tensor = mesh["expert"], mesh["tensor"]
        shards = mesh["fsdp"] * expert * tensor
        own = rows * tensor // one["devices"]
        working = machines.working_bytes(size, tensor, expert)

        def used(pieces):
            state = (20 if pieces > 1 else 16) * machines.parameters(size) / shards  # noqa: B023
            return state + working + own / pieces * machines.row_bytes(size, tensor, expert)  # noqa: B023

        assert own % pieces == 0 and used(pieces) <= 0.9 * one["hbm"], place
        fewer = max((n for n in range(1, pieces) if own % n == 0), default=0)
        assert not fewer or used(fewer) > 0.9 * one["hbm"], place


def choose(place: str, size: dict, rows: int) -> dict | None:
    try:
        return fit(place, size, rows)
    except ValueError:
        return None


def test_accumulation_costs_a_second_copy_of_the_gradients():
    """Four bytes a parameter: the sum so far, beside the gradient of one micro-batch."""
    size = size_of("llama3/8b")
    one, two = (
        machines.used_bytes(size, shards=8, tensor=1, expert=1, rows=1, accumulation=pieces) for pieces in (1, 2)
    )
    assert two - one == 4 * 8_030_261_248 / 8


def test_an_expert_axis_comes_where_gathering_would_be_waited_for():
    """And it is the smallest that the tokens ask for: its exchange costs more memory the larger it is."""
    size = size_of("mixtral/8x7b") | dict(experts=64)  # of a token's two
    found = fit("v5p-1024", size, 1024)
    assert found["mesh"]["expert"] == 4
    facts, tokens = machine("v5p-1024"), 1024 * 4096 / 512 / found["train"]["accumulation"]
    assert machines.fsdp_tokens(facts, size, expert=4) <= tokens < machines.fsdp_tokens(facts, size, expert=2)


# ---------------------------------------------------------------------------------- the arithmetic, by hand


def test_tokens_that_hide_the_weights():
    h100, dense, mixed = machine("h100x64"), size_of("llama3/70b"), size_of("mixtral/8x7b")
    assert machines.fsdp_tokens(h100, dense) == pytest.approx(989e12 / 450e9)  # 2 P t / flops = 2 P / bandwidth
    assert machines.fsdp_tokens(h100, dense, slow=True) == pytest.approx(
        989e12 / 400e9
    )  # eight cards of 50 GB/s a node
    assert machines.fsdp_tokens(h100, dense, tensor=4) == pytest.approx(989e12 / 450e9 / 4)
    assert machines.fsdp_tokens(h100, mixed) == pytest.approx(4 * 989e12 / 450e9)  # eight experts move, two are met
    assert machines.fsdp_tokens(h100, mixed, expert=2) == pytest.approx(2 * 989e12 / 450e9)
    assert machines.fsdp_tokens(h100, mixed, expert=8, slow=True) == pytest.approx(4 * 989e12 / 400e9)


def test_widths_and_lengths_that_hide_the_activations():
    h100, v5p, size = machine("h100x8"), machine("v5p-8"), size_of("llama3/70b")
    assert machines.tensor_limit(h100, size) == pytest.approx(1.5 * 28_672 * 450e9 / 989e12)
    assert machines.ring_tokens(h100, size) == pytest.approx(2 * 8 / 64 * 989e12 / 450e9)
    assert machines.expert_width(v5p) == pytest.approx(510)
    assert machines.data_tokens(h100) == pytest.approx(2 / 3 * 989e12 / 400e9)


def test_a_pipelines_bubble_is_the_one_that_training_tells():
    assert machines.bubble(4, 1, 4) == 3 / 7 and machines.bubble(8, 4, 32) == 7 / 135
    for sizes in ((1, 1, 1), (4, 1, 16), (4, 2, 16), (8, 4, 32)):
        assert machines.bubble(*sizes) == bubble(*sizes)
    assert inspect.signature(machines.bubble) == inspect.signature(bubble)


def test_a_rows_activations_by_hand():
    """Inputs of 80 blocks of 8,192 numbers, and one block's inside (4 widths, 3 MLPs) twice, of 2 bytes."""
    expected = 2 * 8192 * (80 * 8192 + 2 * (4 * 8192 + 3 * 28_672))
    assert machines.row_bytes(size_of("llama3/70b"), 1) == expected
    assert machines.row_bytes(size_of("llama3/70b"), 8) == expected / 8
    assert 3 * 4 * 512 * 128_256 < 2 * 8192 * 2 * (4 * 8192 + 3 * 28_672)  # a chunk's logits, three times, take less


def test_a_rows_activations_of_experts_by_hand():
    """Two rows of products a token; eight with an axis of eight, each of one expert, that may get every token."""
    size = size_of("mixtral/8x7b")
    for expert, products in ((1, 2), (2, 4), (4, 8), (8, 8)):
        inside = 4 * 4096 + products * (2 * 4096 + 3 * 14_336)
        assert machines.exchanged(size, expert) == products
        assert machines.row_bytes(size, 1, expert) == 2 * 4096 * (32 * 4096 + 2 * inside)


@pytest.mark.parametrize(("num_experts", "top_k", "parts"), [(8, 2, 2), (8, 2, 4), (8, 2, 8), (8, 4, 2), (4, 3, 2)])
def test_the_exchange_has_room_for_as_many_rows_as_counted(num_experts, top_k, parts):
    """The grouped products of `dropless`, traced for a mesh of `parts` devices."""
    tokens, width, mlp = 16, 8, 32
    layout = sharding.abstract_layout(load("examples/mixture", ["mesh.data=1", f"mesh.expert={parts}"]).mesh, parts)
    shape = jax.ShapeDtypeStruct
    weights, choices = (shape((parts, tokens, top_k), dtype) for dtype in (jnp.float32, jnp.int32))
    bank = Bank(*(shape((num_experts, *sizes), jnp.float32) for sizes in ((width, mlp), (mlp, width), (width, mlp))))
    run = functools.partial(dropless, activation=lambda up, gate: up * gate, layout=layout)
    program = str(jax.make_jaxpr(run)(shape((parts, tokens, width), jnp.float32), weights, choices, bank))
    rows = tokens * machines.exchanged(dict(experts=num_experts, top_k=top_k), parts)
    products = [line for line in program.splitlines() if "= ragged_dot" in line]
    assert products and all(f"f32[{rows}," in line for line in products)


def test_activations_are_about_what_a_compiler_asks_for():
    """LLaMA-3 8B, 32 rows a v5p chip of 32: the TPU compiler refused it for 121.19 GiB of temporaries."""
    size = size_of("llama3/8b")
    used = machines.used_bytes(size, shards=32, tensor=1, expert=1, rows=32, accumulation=1)
    temporaries = used - 12 * 8_030_261_248 / 32  # parameters and moments are arguments, gradients are not
    assert temporaries / 2**30 == pytest.approx(121.19, rel=0.05)


def test_whole_weights_by_hand():
    """A layer in bfloat16 and its gradient, or the head in bfloat16 and its gradient in float32."""
    layer = 2 * 16_384**2 * (1 + 8 / 128) + 3 * 16_384 * 53_248
    assert machines.working_bytes(size_of("llama3/405b"), 1) == 4 * layer > 6 * 16_384 * 128_256
    assert machines.working_bytes(size_of("llama3/8b"), 1) == 6 * 4096 * 128_256
    experts = 3 * 4096 * 14_336
    attention = 2 * 4096**2 * (1 + 8 / 32)
    assert machines.working_bytes(size_of("mixtral/8x7b"), 1) == 4 * (attention + 8 * experts)
    assert machines.working_bytes(size_of("mixtral/8x7b"), 2, 4) == 4 * (attention + 2 * experts) / 2


# ----------------------------------------------------------------------------------------------- the guide


def test_the_guides_tables_are_computed():
    text = mesh_tables.GUIDE.read_text(encoding="utf-8")
    assert mesh_tables.filled(text) == text, "run: python tests/mesh_tables.py"


def test_the_worked_examples_are_bound_by_compute():
    """As the guide says below their table."""
    for name, kind in mesh_tables.WORKED:
        one, (size, rows) = machine(name), mesh_tables.CLASSES[kind]
        found = fit(name, size, rows)
        tokens = rows * size["length"] / one["devices"] / found["train"]["accumulation"]
        assert mesh_tables.hidden(name, kind)
        assert found["mesh"]["data"] == 1 or tokens >= machines.data_tokens(one)


def test_the_guides_commands_are_configs():
    """Every command and the flags it stands beside can be read; the ones written out are the presets."""
    text = mesh_tables.GUIDE.read_text(encoding="utf-8")
    written = {"llama3/70b": "llama3/70b:h100x64", "llama3/405b": "llama3/405b:v5p-512"}
    seen = set()
    for line in text.splitlines():
        flags = [word.strip("'") for word in line.split() if word.startswith("--config.")]
        changes = [flag.removeprefix("--config.") for flag in flags]
        if line.startswith("llm-jax train"):
            spec = line.split("--config=")[1].split()[0]
            cfg = load(spec, changes)
            check(cfg)
            if spec in written:
                seen.add(spec)
                preset = load(written[spec])
                assert (cfg.mesh, cfg.train.accumulation) == (preset.mesh, preset.train.accumulation)
        elif line.startswith("--config."):
            check(load("llama3/8b", [*changes, "mesh.data=1", "mesh.fsdp=-1", "model.attention_kernel=auto"]))
    assert seen == set(written)
