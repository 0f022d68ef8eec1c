"""Every shipped config: as written it describes itself, and shrunk it trains; published models are as published."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, quick_compiler, slow

from llm_jax import cli, metrics, rng, sharding
from llm_jax.config import MeshConfig, check, config_names, find_config, load, to_dict
from llm_jax.models import registry
from llm_jax.models.flops import training_flops
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.sharding import abstract_layout


def variants() -> list[str]:
    """Every config, and once more with each argument that its docstring's commands give, as in "gpt2/124m:rotary"."""
    found = []
    for name in config_names():
        if "/finetune" in name:  # these start from a checkpoint, which brings model and tokenizer: test_finetune.py
            continue
        with open(find_config(name), encoding="utf-8") as file:
            text = file.read()
        found += [name, *dict.fromkeys(re.findall(rf"--config={re.escape(name)}:[\w-]+", text))]
    return [spec.removeprefix("--config=") for spec in found]


SPECS = variants()

# What makes any config small, whatever it is: a key is shrunk only where the config has more of it.
SMALLER = {
    "model.num_layers": 2, "model.num_heads": 4, "model.max_length": 32, "data.sequence_length": 32,
    "data.tokenizer_vocab_size": 300, "eval.batches": 1, "eval.batch_size": 16,
    "model.moe.num_experts": 8, "model.moe.top_k": 4, "model.moe.expert_dim": 32, "model.moe.shared_dim": 32,
    "model.moe.dense_layers": 1, "model.moe.groups": 4, "model.moe.top_groups": 2,
    "model.vocab_size": 300, "train.accumulation": 2, "optim.warmup_steps": 1,
}  # fmt: skip
FIXED = {
    "model.embed_dim": 32, "model.head_dim": 0, "model.mlp_dim": 0, "train.steps": 2, "train.tokens": 0,
    "train.epochs": 0, "optim.warmup_ratio": 0, "optim.decay_steps": 0, "optim.cooldown_ratio": 0.5,
    "log.trackers": "", "mesh.data": -1, "mesh.fsdp": 1, "mesh.expert": 1, "mesh.sequence": 1, "mesh.tensor": 1,
    "mesh.across_slices": "", "mesh.activation_rules": "", "eval.every": 0, "checkpoint.every": 0,
    "optim.learning_rate": 1e-3, "generate.max_tokens": 0, "checkpoint.init_from": "", "checkpoint.resume_from": "",
    "log.profile_start": 0, "log.profile_steps": 0, "train.global_batch_size": 16, "train.per_device_batch_size": 0,
}  # fmt: skip


def look_up(cfg, key):
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


def shrunk(spec: str, folder) -> list[str]:
    """Overrides that make a config small and give it data: text or tokens, as it asks for."""
    cfg = load(spec)
    changes = {key: size for key, size in SMALLER.items() if look_up(cfg, key) > size} | FIXED
    if len(cfg.model.layer_pattern) > 2:
        changes["model.num_layers"] = len(cfg.model.layer_pattern)
    if cfg.optim.schedule != "wsd":
        del changes["optim.cooldown_ratio"]
    if cfg.data.masking.phases:
        changes["data.masking.phases"] = "1=16"
    if cfg.model.num_kv_heads:
        changes["model.num_kv_heads"] = 2
    sources = [f"data.mixture.{name}" for name in cfg.data.mixture] or ["data"]
    if cfg.data.tokenizer == "none":
        changes |= {f"{source}.path": folder / "train.bin" for source in sources}
        changes |= {f"{source}.validation_path": folder / "val.bin" for source in sources}
    else:
        changes |= {f"{source}.path": "synthetic" for source in sources}
    return [f"--config.{key}={value}" for key, value in changes.items()]


def test_all_arguments_are_found():
    assert {
        "shakespeare_char:cpu",
        "gpt2/124m:fineweb",
        "gpt2/124m:openwebtext",
        "gpt2/124m:rotary",
        "llama3/8b:h100x64",
    } <= set(SPECS)


@pytest.mark.parametrize("spec", SPECS)
def test_describes_itself(capsys, tmp_path, spec):
    """A dry run of the config as it is, but that its text is there where its characters make the vocabulary."""
    check(load(spec))
    (tmp_path / "input.txt").write_text("to be or not to be" * 9)
    needs_text = load(spec).data.tokenizer == "char"
    open_size = -1 in vars(load(spec).mesh).values()  # else it names a machine
    overrides = ["--config.mesh.data=1", "--config.mesh.fsdp=1"] if open_size else []
    overrides += [f"--config.data.path={tmp_path}/input.txt"] if needs_text else []
    assert cli.main(["train", f"--config={spec}", f"--workdir={tmp_path}/run", "--dry_run", *overrides]) == 0
    out = capsys.readouterr().out
    assert f'"name": "{load(spec).name}"' in out
    sizes = r"^[\d,]+ parameters; [\d,]+ tokens a step; "
    work = r"\S+ FLOPs a step \(\d+% of them attention\); \w+ attention \(\w+\)$"
    assert re.search(sizes + work, out, re.M)
    mesh = r"^mesh: stage \d+ x data \d+ x fsdp \d+ x expert \d+ x sequence \d+ x tensor \d+ \(\d+ devices\)$"
    assert re.search(mesh, out, re.M)
    assert re.search(r"^memory a device: [\d,.]+ MiB of state", out, re.M)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spec", SPECS)
def test_no_large_parameter_is_replicated_on_eight_devices(spec):
    """None above 1 MiB, a stack counted by its layer, and by its expert."""
    cfg = load(spec)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or 50_304))
    layout = abstract_layout(MeshConfig(fsdp=8), 8)
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    placed = layout.parameter_shardings(model.shapes(), model.axes())
    names = jax.tree.leaves(model.axes(), is_leaf=lambda node: isinstance(node, tuple))
    leaves = zip(jax.tree.leaves(model.shapes()), jax.tree.leaves(placed), names, strict=True)
    stacks = {"layers": cfg.model.num_layers, "expert": cfg.model.moe.num_experts}
    depth = lambda axes: math.prod(stacks.get(axis, 1) for axis in axes)  # noqa: E731
    large = [x for leaf, x, axes in leaves if 4 * leaf.size > 2**20 * depth(axes)]
    assert large and not any(place.is_fully_replicated for place in large)


def test_the_sharding_table(capsys):
    """Of a model whose shares can be reckoned by hand."""
    changes = ("model.vocab_size=256", "model.activation=gelu", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2")
    sizes = ("model.num_layers=3", "model.embed_dim=64", "model.num_heads=4", "data.tokenizer=byte")
    flags = [f"--config.{change}" for change in (*changes, *sizes, "model.scan_layers=True")]
    assert cli.main(["train", "--config=quickstart", "--print_sharding", *flags]) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    found = {cells[0]: cells[1:] for cells in lines}
    up = ["float32[3, 64, 256]", "layers, embed, mlp", "-, fsdp, tensor", f"{3 * 64 * 256 * 4 // 4:,}"]
    assert found["stack/blocks/mlp/up/kernel"] == up
    assert found["final_norm/scale"] == ["float32[64]", "norm", "replicated", "256"]
    total = sum(int(cells[-1].replace(",", "")) for cells in lines[1:-1])
    assert lines[-1] == [f"{len(lines) - 2} parameters, {total:,} bytes a device"]


def distinct() -> list[str]:
    """The configs that still differ when they are shrunk: the sizes of one recipe are the same then."""
    found = {}
    for spec in SPECS:
        overrides = [change.removeprefix("--config.") for change in shrunk(spec, pathlib.Path())]
        found.setdefault(json.dumps(to_dict(load(spec, [*overrides, "name=any"]))), spec)
    return list(found.values())


def all_recipes() -> list:
    """All of `distinct`; but for one they are slow tests."""
    return [spec if spec == "smoke/everything" else slow(spec) for spec in distinct()]


def guesses(cfg) -> dict[str, int]:
    """About how many answers each loss of an untrained model chooses from."""
    words = 60 if cfg.data.tokenizer == "char" else 300
    if cfg.data.task == "replaced":
        return {"loss": 2, "generator_loss": words}
    pairs = cfg.data.task == "masked" and cfg.data.masking.next_sentence
    return {"loss": words} | ({"pair_loss": 2} if pairs else {})


@pytest.mark.parametrize("spec", all_recipes())
def test_trains_when_shrunk(capsys, tmp_path, spec):
    for number, name in enumerate(("train.bin", "val.bin")):
        np.random.default_rng(number).integers(0, 300, 5000).astype(np.uint16).tofile(tmp_path / name)
    arguments = ["train", f"--config={spec}", f"--workdir={tmp_path}/run", *shrunk(spec, tmp_path)]
    with quick_compiler():
        code = cli.main(arguments)
    assert code == 0, capsys.readouterr().err
    records = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    first, last = (next(r for r in order if "loss" in r) for order in (records, records[::-1]))
    assert last["step"] == 2 and last["bad_total"] == 0
    for name, choices in guesses(load(spec)).items():
        assert np.log(choices) / 1.5 < first[name] < np.log(choices) * 1.5
    assert np.isfinite(records[-1]["eval/loss"])


# ---------------------------------------------------------------------------------------------- published models

# layers, width, heads, head size, published parameters; batch in tokens, learning rate (arXiv 2005.14165, table 2.1)
GPT3 = {
    "125m": (12, 768, 12, 64, 125e6, 0.5e6, 6.0e-4),
    "350m": (24, 1024, 16, 64, 350e6, 0.5e6, 3.0e-4),
    "760m": (24, 1536, 16, 96, 760e6, 0.5e6, 2.5e-4),
    "1b3": (24, 2048, 16, 128, 1.3e9, 1e6, 2.0e-4),
    "2b7": (32, 2560, 32, 80, 2.7e9, 1e6, 1.6e-4),
    "6b7": (32, 4096, 32, 128, 6.7e9, 2e6, 1.2e-4),
    "13b": (40, 5120, 40, 128, 13.0e9, 2e6, 1.0e-4),
    "175b": (96, 12288, 96, 128, 175.0e9, 3.2e6, 0.6e-4),
}


def built(spec):
    cfg = load(spec)
    model = registry.build(cfg.model, sharding.Layout(), Precision.make(cfg.precision))
    return cfg, model, model.shapes()


def standard_count(layers, width, vocab, positions):
    """GPT-2's parameters by hand: 12 D^2 + 13 D a layer, tables, and the last norm."""
    return layers * (12 * width**2 + 13 * width) + (vocab + positions) * width + 2 * width


def test_every_gpt3_size_is_in_the_table():
    assert {name.removeprefix("gpt3/") for name in config_names() if name.startswith("gpt3/")} == GPT3.keys()


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_is_as_published(name):
    layers, width, heads, head_dim, parameters, batch_tokens, learning_rate = GPT3[name]
    cfg, model, shapes = built(f"gpt3/{name}")
    assert (cfg.model.num_layers, cfg.model.embed_dim, cfg.model.num_heads) == (layers, width, heads)
    assert head_dim * heads == width and not cfg.model.head_dim
    assert shapes["stack"]["blocks"]["attention"]["query"]["kernel"].shape == (layers, width, width)
    assert shapes["stack"]["blocks"]["mlp"]["up"]["kernel"].shape == (layers, width, 4 * width)
    assert cfg.model.max_length == cfg.data.sequence_length == 2048
    count = registry.count_parameters(shapes)
    assert count == standard_count(layers, width, 50_304, 2048)
    assert abs(count / parameters - 1) < 0.025  # 350M is 356M; the paper rounds
    assert cfg.train.global_batch_size * 2048 == pytest.approx(batch_tokens, rel=0.05)
    assert cfg.train.tokens == 300e9 and cfg.optim.learning_rate == pytest.approx(learning_rate)
    assert cfg.optim.warmup_steps * cfg.train.global_batch_size * 2048 == pytest.approx(375e6, rel=0.01)
    assert cfg.optim.decay_steps * cfg.train.global_batch_size * 2048 == pytest.approx(260e9, rel=0.01)
    # 6 a parameter in a product, and 12 a layer, width and visible key
    matrices = layers * 12 * width**2 + 50_304 * width
    flops = training_flops(cfg.model, shapes, model.axes(), 2048)
    assert flops.matrices == 6 * matrices
    assert flops.attention == 12 * layers * width * 2049 / 2


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        # 124,439,808 published (GPT-2), and 47 rows of padding
        ("fineweb", 124_439_808 + 47 * 768),
        # the same without biases: 13 D a layer, less the two norms' scales, and the last norm's bias
        ("openwebtext", 124_439_808 + 47 * 768 - 12 * 11 * 768 - 768),
        ("rotary", 12 * 12 * 768**2 + 50_257 * 768),
    ],
)
def test_gpt2_is_as_published(recipe, count):
    cfg, model, shapes = built(f"gpt2/124m:{recipe}")
    assert registry.count_parameters(shapes) == count
    rows = 50_257 if recipe == "rotary" else 50_304
    assert shapes["embedding"]["table"].shape == (rows, 768)
    flops = training_flops(cfg.model, shapes, model.axes(), 1024)
    assert flops.total == 6 * (12 * 12 * 768**2 + rows * 768) + 12 * 12 * 768 * 1025 / 2
    tokens = cfg.train.global_batch_size * cfg.data.sequence_length
    assert (tokens, cfg.train.steps) == {
        "fineweb": (524_288, 19_560), "openwebtext": (491_520, 600_000), "rotary": (524_288, 9_536)
    }[recipe]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "published"), [("fineweb", 11.009), ("openwebtext", 10.95), ("rotary", 10.97)])
def test_first_loss_of_gpt2_is_as_published(recipe, published):
    """At real width, on one row of 64 tokens: a little above ln(50257) = 10.82, as the published runs print it."""
    cfg, model, _ = built(f"gpt2/124m:{recipe}")
    tokens = np.random.default_rng(0).integers(0, 50_257, (1, 65))
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.arange(64)[None], "segment_ids": jnp.ones((1, 64), jnp.int32),
        "loss_weights": jnp.ones((1, 64)),
    }  # fmt: skip
    objective = LanguageObjective(segments=cfg.data.mask_documents)
    params = jax.jit(model.init)(rng.stream(cfg.seed, "init"))
    summed = jax.jit(lambda params: objective.sums(model, params, batch, None)["loss"], compiler_options=QUICK)
    loss = summed(params) / 64
    assert abs(float(loss) - published) < 0.15
