"""Published sizes are as published; meshes for machines are literal, and the guide's numbers are computed."""

import dataclasses
import importlib

import mesh_tables
import numpy as np
import pytest

from configs import machines
from llm_jax import sharding
from llm_jax.config import check, config_names, load
from llm_jax.convert import families
from llm_jax.convert.family import function_of
from llm_jax.errors import ConfigError
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
