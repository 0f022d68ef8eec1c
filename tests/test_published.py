"""Published sizes are as published; meshes for machines are literal, and the guide's numbers are computed."""

import dataclasses
import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import mesh_tables
import numpy as np
import pytest

from configs import machines
from configs.machines import fit, machine
from llm_jax import sharding
from llm_jax.config import check, check_devices, config_names, load
from llm_jax.config.pipeline import bubble
from llm_jax.convert import families
from llm_jax.convert.family import function_of
from llm_jax.errors import ConfigError
from llm_jax.kernels.experts import Bank, dropless
from llm_jax.metrics.hardware import PEAK_FLOPS
from llm_jax.models import registry
from llm_jax.models.flops import training_flops
from llm_jax.precision import Precision

# layers, width, MLP, heads, key-value heads, vocabulary, parameters; rope base, longest context, learning rate,
# tokens of a row and of a step
PUBLISHED = {
    # arXiv 2307.09288, table 1 and section 2.2
    "llama2/7b": (32, 4096, 11_008, 32, 32, 32_000, 6_738_415_616, 1e4, 4096, 3e-4, 4096, 4_194_304),
    "llama2/13b": (40, 5120, 13_824, 40, 40, 32_000, 13_015_864_320, 1e4, 4096, 3e-4, 4096, 4_194_304),
    "llama2/70b": (80, 8192, 28_672, 64, 8, 32_000, 68_976_648_192, 1e4, 4096, 1.5e-4, 4096, 4_194_304),
    # arXiv 2407.21783, table 3 and section 3.4; the batch is published for 405B alone
    "llama3/8b": (32, 4096, 14_336, 32, 8, 128_256, 8_030_261_248, 5e5, 131_072, 3e-4, 8192, 8_388_608),
    "llama3/70b": (80, 8192, 28_672, 64, 8, 128_256, 70_553_706_496, 5e5, 131_072, 1.5e-4, 8192, 8_388_608),
    "llama3/405b": (126, 16_384, 53_248, 128, 8, 128_256, 405_853_388_800, 5e5, 131_072, 8e-5, 8192, 16_777_216),
    # arXiv 2401.04088, table 1, and config.json; batch and learning rate are not published
    "mixtral/8x7b": (32, 4096, 14_336, 32, 8, 32_000, 46_702_792_704, 1e6, 32_768, 3e-4, 4096, 4_194_304),
    "mixtral/8x22b": (56, 6144, 16_384, 48, 8, 32_000, 140_620_634_112, 1e6, 65_536, 1.5e-4, 4096, 4_194_304),
}
# Of the other families: parameters, as counted in the published checkpoints (a tied head once).
COUNTS = {
    "gpt2/larger:355m": 354_823_168,
    "gpt2/larger:774m": 774_030_080,
    "gpt2/larger:1558m": 1_557_611_200,
    "mistral:7b": 7_241_732_096,
    "phi3:mini": 3_821_079_552,
    "phi3:medium": 13_960_238_080,
    "qwen2:0b5": 494_032_768,
    "qwen2:1b5": 1_543_714_304,
    "qwen2:3b": 3_085_938_688,
    "qwen2:7b": 7_615_616_512,
    "qwen2:14b": 14_770_033_664,
    "qwen2:32b": 32_763_876_352,
    "qwen2:72b": 72_706_203_648,
    "qwen3:0b6": 596_049_920,
    "qwen3:1b7": 1_720_574_976,
    "qwen3:4b": 4_022_468_096,
    "qwen3:8b": 8_190_735_360,
    "qwen3:14b": 14_768_307_200,
    "qwen3:32b": 32_762_123_264,
    "qwen3:30b_a3b": 30_532_122_624,
    "qwen3:235b_a22b": 235_093_634_560,
    "gemma:2b": 2_506_172_416,
    "gemma:7b": 8_537_680_896,
    "gemma2:2b": 2_614_341_888,
    "gemma2:9b": 9_241_705_984,
    "gemma2:27b": 27_227_128_320,
    "gemma3:1b": 999_885_952,
    "gemma3:4b": 3_880_263_168,  # these three without the vision tower
    "gemma3:12b": 11_766_034_176,
    "gemma3:27b": 27_009_346_304,
    "olmo2:1b": 1_484_916_736,
    "olmo2:7b": 7_298_617_344,
    "olmo2:13b": 13_716_198_400,
    "olmo2:32b": 32_234_279_936,
    "pythia:70m": 70_426_624,
    "pythia:160m": 162_322_944,
    "pythia:410m": 405_334_016,
    "pythia:1b": 1_011_781_632,
    "pythia:1b4": 1_414_647_808,
    "pythia:2b8": 2_775_208_960,
    "pythia:6b9": 6_857_302_016,
    "pythia:12b": 11_846_072_320,
    "smollm3:3b": 3_075_098_624,
    "smollm2:135m": 134_515_008,
    "smollm2:360m": 361_821_120,
    "smollm2:1b7": 1_711_376_384,
}
# config.json of the hub, without the keys that say nothing about the model.
HUB = {
    "gemma:2b": dict(
        architectures=["GemmaForCausalLM"], attention_bias=False, attention_dropout=0.0, head_dim=256,
        hidden_act="gelu", hidden_size=2048, intermediate_size=16_384, max_position_embeddings=8192,
        num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1, rms_norm_eps=1e-6,
        rope_scaling=None, rope_theta=10_000.0, vocab_size=256_000,
    ),
    "gemma2:27b": dict(
        architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=50.0,
        cache_implementation="hybrid", final_logit_softcapping=30.0, head_dim=128, hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", hidden_size=4608, intermediate_size=36_864,
        max_position_embeddings=8192, num_attention_heads=32, num_hidden_layers=46, num_key_value_heads=16,
        query_pre_attn_scalar=144, rms_norm_eps=1e-6, rope_theta=10_000.0, sliding_window=4096,
        sliding_window_size=4096, vocab_size=256_000,
    ),
    "gemma3:1b": dict(
        architectures=["Gemma3ForCausalLM"], attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None,
        cache_implementation="hybrid", final_logit_softcapping=None, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912,
        max_position_embeddings=32_768, num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1,
        query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_local_base_freq=10_000, rope_scaling=None,
        rope_theta=1_000_000, sliding_window=512, sliding_window_pattern=6, vocab_size=262_144,
    ),
    "olmo2:7b": dict(
        architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0, hidden_act="silu",
        hidden_size=4096, intermediate_size=11_008, max_position_embeddings=4096, num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500_000,
        tie_word_embeddings=False, vocab_size=100_352,
    ),
    "smollm3:3b": dict(
        architectures=["SmolLM3ForCausalLM"], attention_bias=False, attention_dropout=0.0, hidden_act="silu",
        hidden_size=2048, intermediate_size=11_008, layer_types=["full_attention"] * 36,
        max_position_embeddings=65_536, max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16, num_hidden_layers=36, num_key_value_heads=4,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5_000_000.0, sliding_window=None, use_sliding_window=False,
        vocab_size=128_256,
    ),
    "pythia:160m": dict(
        architectures=["GPTNeoXForCausalLM"], hidden_act="gelu", hidden_size=768, intermediate_size=3072,
        layer_norm_eps=1e-5, max_position_embeddings=2048, num_attention_heads=12, num_hidden_layers=12,
        rotary_emb_base=10_000, rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True,
        vocab_size=50_304,
    ),
}  # fmt: skip
ACTIVE = {"mixtral/8x7b": 12_879_925_248, "mixtral/8x22b": 39_152_031_744}  # two of eight experts: "13B", "39B"


# Parameters, and those that a token meets, the embedding not counted: arXiv 2405.04434, appendix B ("15.7B", "2.4B");
# 2412.19437, section 4.2 ("671B", "37B" with it); 2508.10925, table 1 ("20.91B", "3.61B"; "116.83B", "5.13B").
MIXTURES = {
    "deepseek/v2_lite": (15_706_484_224, 2_451_308_544),
    "deepseek/v3": (671_026_419_200, 36_624_596_992),
    "gpt_oss/20b": (20_914_757_184, 3_607_142_400),
    "gpt_oss/120b": (116_829_156_672, 5_131_100_160),
}


def built(spec: str):
    cfg = load(spec)
    check(cfg)
    model = registry.build(cfg.model, sharding.Layout(), Precision.make(cfg.precision))
    return cfg, model


def test_every_published_size_is_in_the_table():
    assert {name for name in config_names() if name.partition("/")[0] in ("llama2", "llama3", "mixtral")} == {
        *PUBLISHED,
        "llama2/7b_v5p_64",  # meshes that a plan found
        "mixtral/8x7b_v5p_128",
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_as_published(name):
    layers, width, mlp, heads, kv_heads, vocab, parameters, base, context, rate, length, batch = PUBLISHED[name]
    cfg, model = built(name)
    found = cfg.model
    assert (found.num_layers, found.embed_dim, found.mlp_dim) == (layers, width, mlp)
    assert (found.num_heads, found.num_kv_heads, found.vocab_size) == (heads, kv_heads, vocab)
    assert width // heads == 128 and not found.head_dim
    assert (found.rope.base, found.max_length, found.norm_eps) == (base, context, 1e-5)
    assert (found.norm, found.activation, found.bias, found.tie_embeddings) == ("rmsnorm", "swiglu", "none", False)
    assert registry.count_parameters(model.shapes()) == parameters
    assert cfg.optim.learning_rate == rate and cfg.data.sequence_length == length
    assert cfg.train.global_batch_size * length == batch
    assert (cfg.optim.beta1, cfg.optim.beta2, cfg.optim.weight_decay, cfg.optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_published(name):
    """The vocabulary's padding, which is ours, left out."""
    cfg = load(name)
    check(cfg)
    model = registry.build(dataclasses.replace(cfg.model, vocab_multiple=1), sharding.Layout(), Precision())
    assert registry.count_parameters(model.shapes()) == COUNTS[name]


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_as_published(name):
    cfg, model = built(name)
    flops = training_flops(cfg.model, model.shapes(), model.axes(), cfg.data.sequence_length)
    assert (registry.count_parameters(model.shapes()), flops.matrices / 6) == MIXTURES[name]


@pytest.mark.parametrize(
    ("name", "axes", "across"),
    [
        ("gpt_oss/120b:h100x512", dict(data=8, fsdp=64), ("fsdp=8", "data=8")),  # 2,880 = 64 * 45
        ("deepseek/v3:h100x2048", dict(data=2, fsdp=512, tensor=2), ("fsdp=128", "data=2")),  # latents of 512
    ],
)
def test_meshes_split_widths_in_equal_parts(name, axes, across):
    cfg, _ = built(name)
    assert {axis: getattr(cfg.mesh, axis) for axis in axes} == axes and cfg.mesh.across_slices == across
    layout = sharding.abstract_layout(cfg.mesh, int(name.rpartition("x")[2]), "gpu")
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    layout.parameter_shardings(model.shapes(), model.axes())


@pytest.mark.parametrize("name", HUB)
def test_a_preset_is_the_published_model(name):
    """The keys of config.json that change what it computes, as the converter reads them, older spellings too."""
    found = families.of_config(HUB[name], "here").config(HUB[name], "here")
    assert function_of(found) == function_of(load(name).model)


def test_every_size_of_a_family_is_in_the_table():
    """A file's sizes are the keys of its SIZES."""
    families = {spec.partition(":")[0] for spec in COUNTS}
    sizes = {f"{name}:{size}" for name in families for size in importlib.import_module(
        "configs." + name.replace("/", ".")).SIZES}  # fmt: skip
    assert sizes == set(COUNTS)


def test_a_family_on_a_machine():
    small, large = load("qwen3:8b").mesh, load("qwen3:8b:v5p-512").mesh
    assert small.fsdp == -1 and large.fsdp > 1 and load("qwen3:8b:v5p-512").model == load("qwen3:8b").model
    with pytest.raises(ConfigError, match="qwen3:9b is not one of 0b6"):
        load("qwen3:9b")
    with pytest.raises(ConfigError, match="there is no machine 'h100-64'"):
        load("qwen3:8b:h100-64")


def test_llama3_rotates_as_the_released_3_1():
    """A head's slowest pair turns 8 times slower than unscaled, the fastest as before (the model card's scaling)."""
    from llm_jax.models.positions import rotary_frequencies

    frequencies, _ = rotary_frequencies(load("llama3/8b").model.rope, 128)
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    assert frequencies[0] == plain[0] == 1 and frequencies[-1] == pytest.approx(plain[-1] / 8)
    # LLaMA 3 of April 2024
    changes = ["model.rope.scaling=none", "model.rope.factor=1", "model.max_length=8192"]
    cfg = load("llama3/8b", changes)
    check(cfg)
    assert rotary_frequencies(cfg.model.rope, 128)[0] == pytest.approx(plain)


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_two_of_eight_experts(name):
    """6 FLOPs for each parameter that a token meets in a product: all but the embedding table and the norms."""
    cfg, model = built(name)
    moe = cfg.model.moe
    assert (moe.num_experts, moe.top_k, moe.renormalize) == (8, 2, True)
    norms = (2 * cfg.model.num_layers + 1) * cfg.model.embed_dim
    table = cfg.model.vocab_size * cfg.model.embed_dim
    flops = training_flops(cfg.model, model.shapes(), model.axes(), 4096)
    assert flops.matrices == 6 * (ACTIVE[name] - norms - table)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_preset_counts_what_the_model_has(name):
    assert machines.parameters(size_of(name)) == PUBLISHED[name][6]


def size_of(name: str) -> dict:
    layers, width, mlp, heads, kv_heads, vocab, *_, length, _ = PUBLISHED[name]
    experts = dict(experts=8, top_k=2) if name.startswith("mixtral") else {}
    return machines.model_size(layers=layers, width=width, mlp=mlp, heads=heads, kv_heads=kv_heads, vocab=vocab,
                               length=length, **experts)  # fmt: skip


def test_the_guides_classes_are_the_shipped_sizes():
    shipped = {"8B": "llama3/8b", "70B": "llama3/70b", "405B": "llama3/405b", "8x7B": "mixtral/8x7b"}
    for kind, name in shipped.items():
        assert mesh_tables.CLASSES[kind] == (size_of(name), load(name).train.global_batch_size)


# ---------------------------------------------------------------------------------------------------- machines


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
