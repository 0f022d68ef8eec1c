"""GPT-OSS: attention sinks, windows in every other layer, biases everywhere, experts with a clamped SwiGLU.

Gate and up of each expert lie in one tensor, number by number in turns.
"""

from collections.abc import Collection, Iterator
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.convert.families.llama import attention_rules, outer_rules, read_common, write_common
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.keys import Keys
from llm_jax.convert.packed import read_packing
from llm_jax.convert.rules import Interleaved, Rule, linear
from llm_jax.convert.windows import read_words, window_keys, write_windows

YARN = {  # where neither rope_scaling nor rope_parameters is given
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def read_gpt_oss(keys: Keys) -> dict[str, Any]:
    read_packing(keys, "mxfp4")
    keys.only("attention_bias", True, default=True, reason="our model has biases in all layers or in none")
    keys.only("swiglu_alpha", 1.702, default=1.702, reason="our clamped SwiGLU has 1.702")
    keys.only("swiglu_limit", 7.0, default=7.0, reason="our clamped SwiGLU ends at 7")
    keys.ignore("initial_context_length", "experts_per_token")  # the rope's own keys and num_experts_per_tok say it
    if keys.take("rope_scaling", None) is None and keys.take("rope_parameters", None) is None:
        keys.values["rope_scaling"] = YARN
    found = read_common(keys, kv_heads=8, head_dim=64, base=150_000.0, max_length=131_072, norm_eps=1e-5)
    layers, window = found["num_layers"], keys.take("sliding_window", 128)
    default = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    moe = {
        "num_experts": keys.take("num_local_experts", keys.take("num_experts", 128)),
        "top_k": keys.take("num_experts_per_tok", 4),
        "renormalize": True,  # softmax over the chosen
        "router_bias": True,
        "balance_loss": keys.take("router_aux_loss_coef", 0.001),
    }
    found |= window_keys(read_words(keys, layers, window, default), window)
    return found | {"activation": "clamped_swiglu", "bias": "all", "attention_sinks": True, "moe": moe}


def write_gpt_oss(cfg: DecoderConfig) -> dict[str, Any]:
    written = write_common(cfg) | write_windows(cfg)
    if written["rope_scaling"] is None:  # left out, it would stand for YaRN
        written["rope_scaling"] = {"rope_type": "default"}
    return written | {
        "hidden_act": "silu",
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "num_local_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.top_k,
        "router_aux_loss_coef": cfg.moe.balance_loss,
    }


def gpt_oss_rules(cfg: DecoderConfig, names: Collection[str]) -> Iterator[Rule]:
    theirs, ours = "model.layers.{layer}", "stack/{layer}"
    yield from outer_rules(cfg)
    yield from attention_rules(cfg)
    yield Rule.of(f"{theirs}.self_attn.sinks", f"{ours}/attention/sinks")
    yield from linear(f"{theirs}.mlp.router", f"{ours}/moe/router", bias=True)
    in_turns = Interleaved(-1, function_of(cfg).moe.expert_dim, 2)
    for theirs_end, part in (("", "kernel"), ("_bias", "bias")):
        gate_up = [f"{ours}/moe/gate/{part}", f"{ours}/moe/up/{part}"]
        yield Rule.of(f"{theirs}.mlp.experts.gate_up_proj{theirs_end}", gate_up, in_turns)
        yield Rule.of(f"{theirs}.mlp.experts.down_proj{theirs_end}", f"{ours}/moe/down/{part}")


GPT_OSS = Family("GPT-OSS", "GptOssForCausalLM", "gpt_oss", read_gpt_oss, write_gpt_oss, gpt_oss_rules)
