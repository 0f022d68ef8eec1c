"""`llm-jax plan`: the page, the quick estimate against the compilers' figures, the search, what does not fit."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import machines
from llm_jax.cli import main
from llm_jax.config import from_dict, load
from llm_jax.errors import ConfigError, UserError
from llm_jax.models.flops import training_flops
from llm_jax.plan import candidates, compile, fit, hlo, report
from llm_jax.plan.cost import step_times
from llm_jax.plan.estimate import Estimate
from llm_jax.plan.hardware import HARDWARE, topology
from llm_jax.plan.network import placed
from llm_jax.plan.quick import quick_estimate
from llm_jax.plan.search import Tried
from llm_jax.plan.setting import make_setting, slices_note
from llm_jax.training import executable
from llm_jax.training.lower import batch_shapes, lower_step

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import make_plan_compiled  # noqa: E402

COMPILED = json.loads((GOLDEN / "plan_compiled.json").read_text(encoding="utf-8"))
SMALL = ("mesh.fsdp=8", "mesh.data=1", "train.global_batch_size=16", "model.num_layers=2", "data.mask_documents=False")


def small(*overrides: str, machine: str = "h100:1x8"):
    return make_setting(load("llama2/7b", (*SMALL, *overrides)), topology(machine))


# ------------------------------------------------------------------------------------------------------- machines


def test_machines_are_those_that_the_presets_know():
    """The same data sheets stand in configs/machines.py, which imports nothing of the package."""
    for name, columns in machines.MACHINES.items():
        chip = dict(zip(machines.COLUMNS, columns, strict=True))
        one = HARDWARE[name]
        assert one.kind == chip["kind"]
        assert one.flops * one.devices_a_chip == pytest.approx(chip["flops"])
        links = 2 * one.torus if one.tpu else 1
        assert one.link * links == pytest.approx(chip["fast"] / (one.devices_a_chip if name != "tpu7x" else 2))
        assert 0.9 < one.memory / (chip["hbm"] / one.devices_a_chip) < 1.06  # data sheets mix GB and GiB


def test_topologies_are_read():
    slices = topology("v5p:8x8x8", 2)
    assert (slices.chips, slices.devices, slices.domain, slices.domains) == (1024, 1024, 512, 2)
    assert topology("tpu7x:4x4x4").devices == 128
    nodes = topology("h100:16x8")
    assert (nodes.chips, nodes.domain, nodes.domains) == (128, 8, 16)


@pytest.mark.parametrize(
    "text, slices, said",
    [
        ("v5x:4x4", 1, "did you mean"),
        ("v5p", 1, "sizes"),
        ("v5p:4x4", 1, "3 sizes"),
        ("h100:64", 1, "NODESxGPUS"),
        ("v5e:0x4", 1, "sizes"),
        ("h100:2x8", 2, "--slices=2"),
        ("v5p:4x4x4", 0, "--slices=0"),
    ],
)
def test_topologies_that_are_none_are_refused(text, slices, said):
    with pytest.raises(UserError, match=said):
        topology(text, slices)


# -------------------------------------------------------------------------------------------------------- settings


def test_a_mesh_takes_the_machines_devices_and_one_that_does_not_fit_is_refused():
    assert small("mesh.fsdp=-1").mesh["fsdp"] == 8
    with pytest.raises(ConfigError, match="mesh.fsdp"):
        small("mesh.fsdp=3")
    with pytest.raises(UserError, match="vocab_size"):
        make_setting(load("quickstart"), topology("h100:1x8"))


def test_nodes_that_no_axis_goes_over_are_noted():
    two = ("mesh.fsdp=16",)
    assert "mesh.across_slices" in slices_note(small(*two, machine="h100:2x8"))
    assert slices_note(small(*two, "mesh.across_slices=fsdp=2", machine="h100:2x8")) == ""
    sliced = load("llama2/7b", (*SMALL, "mesh.data=2", "mesh.fsdp=64", "mesh.across_slices=data=2",
                                "train.global_batch_size=128"))  # fmt: skip
    assert "overstates" in slices_note(make_setting(sliced, topology("v5p:4x4x4", 2)))


def test_state_is_counted_by_its_shardings():
    state = small().state_bytes()
    parameters = small().parameters
    assert state["parameters"] == pytest.approx(4 * parameters / 8, rel=0.01)
    assert state["optimizer"] == pytest.approx(2 * state["parameters"], rel=0.01)
    assert small("train.accumulation=2").state_bytes()["gradients"] == 2 * state["gradients"]


# ------------------------------------------------------------------------------------------------ the quick estimate


@pytest.mark.parametrize("name", make_plan_compiled.SETTINGS)
def test_the_quick_estimate_lies_near_the_compiled_one(name):
    found, compiled = quick_estimate(make_plan_compiled.setting(name)), COMPILED[name]
    memory = sum(size for part, size in compiled["memory"].items() if part != "host")
    assert found.memory.total == pytest.approx(memory, rel=0.15)
    assert found.times.total == pytest.approx(compiled["times"]["total"], rel=0.25)
    assert found.times.flops == pytest.approx(compiled["flops"], rel=0.1)


def test_what_is_kept_and_computed_again_follows_remat():
    none, full = (quick_estimate(small(f"model.remat={name}")) for name in ("none", "full"))
    names = quick_estimate(small("model.remat=names", "model.remat_save=query,key,value"))
    assert none.memory.activations > names.memory.activations > full.memory.activations
    assert none.times.flops < names.times.flops < full.times.flops
    halves = quick_estimate(small("model.remat=full", "train.accumulation=2"))
    assert halves.memory.activations == full.memory.activations / 2


def test_a_compiled_steps_products_are_those_of_the_model():
    """The text of a real step, compiled here: three times the forward pass's FLOPs."""
    model = tiny.decoder(vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=3, activation="swiglu", remat="none")
    cfg = from_dict({"model": dataclasses.asdict(model), "data": {"sequence_length": 16, "mask_documents": False},
                     "train": {"steps": 1, "global_batch_size": 8}, "mesh": {"fsdp": 8, "data": 1}})  # fmt: skip
    layout = tiny.mesh_layout(fsdp=8)
    text = lower_step(cfg, layout).compile(compiler_options=tiny.QUICK).as_text()
    times = step_times(hlo.parse(text), placed(topology("h100:1x8"), {"fsdp": 8}))
    built = tiny.build(cfg.model, layout)
    needed = training_flops(cfg.model, built.shapes(), built.axes(), 16)
    scores = needed.attention * 16 / 8.5  # the whole square is computed here: 16 keys a query, not 8.5
    assert times.flops * 8 == pytest.approx((needed.matrices + scores) * 8 * 16, rel=0.02)
    assert {axes for _, axes in times.moved} == {"fsdp"}


# ------------------------------------------------------------------------------------------------------ the command


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def flags(*overrides: str) -> list[str]:
    return ["--config=llama2/7b", *(f"--config.{override}" for override in (*SMALL, *overrides))]


def test_the_quick_page_says_all_that_the_compiled_one_does(capsys):
    code, page, _ = run(capsys, *flags(), "--topology=h100:1x8", "--quick", "--tokens=1e9", "--price=2")
    assert code == 0
    tables = ("memory a device, GiB", "saved activations", "collectives of a device", "all-gather", "a step, seconds")
    rates = ("waiting for the network", "causal MFU", "tokens/s", "1e+09 tokens take", "at 2 a chip-hour")
    assert all(part in page for part in tables + rates)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--config=llama2/7b"], "--topology"),
        (["--topology=v5p:4x4x4"], "--config"),
        (["--config=llama2/7b", "--topology=v5p:4x4x4", "--price=-1"], "--price"),
        (["--topology=v5p:4x4x4", "--hlo=nothing.txt"], "nothing.txt"),
        (["--topology=v5p:4x4x4", "--hlo=nothing.txt", "--mesh=fsdp"], "AXIS=SIZE"),
        (["--config=llama2/7b", "--topology=v5p:4x4x4", "--search", "--candidates=0"], "--candidates"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(capsys, arguments, said):
    code, _, error = run(capsys, *arguments)
    assert code == 2 and said in error and "Traceback" not in error


def test_a_text_from_elsewhere_is_timed(capsys, tmp_path):
    mesh = jax.sharding.Mesh(jax.devices()[:8], ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    given = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=rows)
    file = tmp_path / "theirs.txt"
    file.write_text(jax.jit(lambda x: x @ x.T).lower(given).compile().as_text())
    code, page, _ = run(capsys, "--topology=h100:1x8", f"--hlo={file}", "--mesh=rows=8")
    assert code == 0 and "all-gather" in page and "FLOPs a device and step" in page
    code, _, error = run(capsys, "--topology=h100:2x8", f"--hlo={file}")
    assert code == 2 and "for 8 devices" in error


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for machine, extra in (("v5e:4x2", "plan-tpu"), ("h100:1x8", "plan-cuda")):
        with pytest.raises(UserError, match=extra):
            compile.Job(small(machine=machine))


# -------------------------------------------------------------------------------------------- search, and what fits


def test_the_best_by_arithmetic_fit_and_differ():
    cfg = load("llama2/7b", (*SMALL, "model.num_layers=32"))
    chosen = candidates.best(cfg, topology("h100:1x8"), 5)
    assert len(chosen) == 5 and all(one.fits for one in chosen)
    assert [one.seconds for one in chosen] == sorted(one.seconds for one in chosen)
    kinds = {tuple(str(v) for k, v in one.changes.items() if k != "train.accumulation") for one in chosen}
    assert len(kinds) == 5
    for one in chosen:  # what is printed makes the setting that was weighed
        words = report.override_lines(candidates.differing(cfg, one.changes)).split()
        again = load("llama2/7b", (*SMALL, "model.num_layers=32", *(w.removeprefix("--config.") for w in words)))
        assert make_setting(again, topology("h100:1x8")).cfg == one.setting.cfg


def test_meshes_over_nodes_say_so():
    for changes in candidates.meshes(load("llama2/7b", SMALL), topology("h100:4x8")):
        sizes = [changes[f"mesh.{axis}"] for axis in ("data", "fsdp", "expert", "tensor")]
        assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == 32
        assert changes["mesh.across_slices"] in (("data=4",), ("fsdp=4",))


def experts(*changes):
    return small("model.moe.num_experts=8", "model.mlp_dim=4096", "train.loss_chunk=0", *changes)


KEEPS = ("layer_input", "mlp_up", "mlp_gate", "mlp_output")


def test_kept_results_of_experts_cost_memory_and_save_products():
    again = {}
    for name, remat in {"full": "full", "kept": "names", "dots": "dots", "none": "none"}.items():
        save = [f"model.remat_save={','.join(KEEPS)}"] if remat == "names" else []
        found = quick_estimate(experts(f"model.remat={remat}", *save))
        again[name] = found.memory.activations, found.times.kernel
    assert again["full"][0] < again["dots"][0] < again["kept"][0] < again["none"][0]
    assert again["full"][1] == pytest.approx(again["dots"][1], rel=0.1)  # no product of experts is a "dot"
    assert again["kept"][1] < 0.85 * again["full"][1]


def test_the_search_keeps_results_of_experts_with_and_without_a_gate():
    for activation, gate in (("swiglu", {"mlp_gate"}), ("gelu", set())):
        cfg = experts(f"model.activation={activation}").cfg
        saved = [set(way["model.remat_save"]) for way in candidates.ways_of_remat(cfg.model)]
        assert {"layer_input", "mlp_up", "mlp_output"} | gate in saved
        assert all("mlp_gate" in names for names in saved if "mlp_up" in names) == bool(gate)
        assert any(
            "mlp_output" in one.changes["model.remat_save"] for one in candidates.candidates(cfg, topology("h100:1x8"))
        )


def test_remedies_fit_and_the_refusal_names_what_does_not():
    setting = small("model.num_layers=32", "model.remat=none", "train.global_batch_size=64")
    found = quick_estimate(setting)
    assert not found.fits
    remedies = fit.remedies(setting)
    assert len(remedies) >= 3 and all(one.fits for one in remedies)
    assert len({tuple(sorted(one.changes)) for one in remedies}) == len(remedies)
    good = [Tried(one, quick_estimate(one.setting)) for one in remedies[:3]]
    page = report.misfit(setting, found.memory.total, fit.large_tensors(setting), good)
    assert "does not fit on h100:1x8" in page and "too many" in page and "mlp_up" in page
    assert page.count("s a step") == 3 and "--config." in page


def test_a_compilers_refusal_is_counted():
    setting = small(machine="v5e:4x2")
    said = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (32.92G) exceeds available HBM (15.75G)"
    state = setting.state_bytes()
    expected = 32.92 * 2**30 + state["parameters"] + state["optimizer"]
    assert fit.needed_bytes(setting, compile.Compiled({"refused": said}, ""), None) == pytest.approx(expected)


def test_two_are_set_side_by_side():
    one, two = (quick_estimate(small(f"model.remat={name}")) for name in ("full", "dots"))
    page = report.comparison(one, two, price=2.0, tokens=1e9)
    assert "side by side" in page and "saved activations" in page and "cost" in page
    assert isinstance(one, Estimate)


# ------------------------------------------------------------------------------------------------ a step in a file


def test_a_saved_step_is_loaded_where_everything_agrees(tmp_path):
    cfg = from_dict({"model": dataclasses.asdict(tiny.decoder()), "train": {"steps": 1, "global_batch_size": 8},
                     "data": {"sequence_length": 16}, "mesh": {"fsdp": 8, "data": 1}})  # fmt: skip
    layout = tiny.mesh_layout(fsdp=8)
    lowered = lower_step(cfg, layout)
    compiled, batch = lowered.compile(compiler_options=tiny.QUICK), batch_shapes(cfg, layout)
    made_from = executable.fingerprint(cfg, jax.devices()[:8], batch)
    file = tmp_path / "step"
    executable.save(file, compiled, made_from)
    loaded = executable.load(str(file), lowered, made_from)
    places = jax.tree.leaves(compiled.input_shardings)

    def result(step):
        zeros = [
            jnp.zeros(a.shape, a.dtype, device=p)
            for a, p in zip(jax.tree.leaves(lowered.in_avals), places, strict=True)
        ]
        args, _ = jax.tree.unflatten(lowered.in_tree, zeros)
        return jax.tree.map(np.asarray, step(*args))

    jax.tree.map(np.testing.assert_array_equal, result(loaded), result(compiled))
    other = dataclasses.replace(cfg, seed=cfg.seed + 1)
    with pytest.raises(UserError, match="config: .* there"):
        executable.load(str(file), lowered, executable.fingerprint(other, jax.devices()[:8], batch))
    fewer = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, fsdp=4))
    with pytest.raises(UserError, match="4 of kind"):
        executable.load(str(file), lowered, executable.fingerprint(fewer, jax.devices()[:4], batch))
    (tmp_path / "none").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a step"):
        executable.load(str(tmp_path / "none"), lowered, made_from)


# ----------------------------------------------------------------------------------------------- the real compilers


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine, package", [("v5e:2x4", "libtpu"), ("v6e:2x4", "libtpu"), ("h100:1x8", "jax_cuda13_plugin")]
)
def test_the_real_compiler_plans(capsys, tmp_path, monkeypatch, machine, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    widths = ("model.embed_dim=512", "model.mlp_dim=1024", "model.num_heads=4", "model.num_kv_heads=4")
    text = tmp_path / "step.txt"
    code, page, error = run(capsys, *flags(*widths), f"--topology={machine}", f"--dump_hlo={text}")
    assert code == 0, error
    assert "compiled by" in page and "fits" in page and "all-gather" in page or "reduce-scatter" in page
    found = hlo.parse(text.read_text())
    assert found.partitions == 8
