"""Mixtures of experts of the LLaMA line: Mixtral, Qwen 3 MoE. Softmax over all experts, then the likeliest k."""

from collections.abc import Collection, Iterator
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.families.llama import attention_rules, outer_rules, read_common, write_common
from llm_jax.convert.families.qwen import read_window, write_window
from llm_jax.convert.keys import Keys
from llm_jax.convert.rules import Chain, Cut, Rule, Swapped, linear


def read_mixtral(keys: Keys) -> dict[str, Any]:
    keys.only("router_jitter_noise", 0, default=0, reason="our router adds no noise")
    moe = {
        "num_experts": keys.take("num_local_experts", 8),
        "top_k": keys.take("num_experts_per_tok", 2),
        "balance_loss": keys.take("router_aux_loss_coef", 0.001),
        "renormalize": True,
    }
    found = read_common(keys, kv_heads=8, base=1e6, max_length=131_072, norm_eps=1e-5)
    return found | {"moe": moe, "sliding_window": keys.take("sliding_window", None) or 0}


def write_mixtral(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg) | {
        "num_local_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.top_k,
        "router_aux_loss_coef": cfg.moe.balance_loss,
        "sliding_window": cfg.sliding_window or None,
    }


def read_qwen3_moe(keys: Keys) -> dict[str, Any]:
    reason = "our model has experts in every layer"
    keys.only("decoder_sparse_step", 1, default=1, reason=reason)
    keys.only("mlp_only_layers", [], None, default=None, reason=reason)
    keys.only("attention_bias", False, default=False, reason="our model has no bias of these layers alone")
    keys.ignore("intermediate_size")  # of layers without experts, of which there are none
    moe = {
        "num_experts": keys.take("num_experts", keys.take("num_local_experts", 128)),  # transformers 4, 5
        "top_k": keys.take("num_experts_per_tok", 8),
        "renormalize": keys.take("norm_topk_prob", False),
        "balance_loss": keys.take("router_aux_loss_coef", 0.001),
    }
    found = read_common(keys, mlp_dim="moe_intermediate_size", kv_heads=4, max_length=32_768)
    return found | {"moe": moe, "qk_norm": "head", "sliding_window": read_window(keys, found["num_layers"], 28)}


def write_qwen3_moe(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg, mlp_dim="moe_intermediate_size") | write_window(cfg) | {
        "num_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.top_k,
        "norm_topk_prob": cfg.moe.renormalize,
        "router_aux_loss_coef": cfg.moe.balance_loss,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }  # fmt: skip


def fused_experts(theirs: str, cfg: DecoderConfig) -> Iterator[Rule]:
    """All experts of a layer in two tensors: gate and up side by side, (E, 2 F, D), and down (E, D, F)."""
    width = function_of(cfg).mlp_dim
    gate_up = ["stack/{layer}/moe/gate/kernel", "stack/{layer}/moe/up/kernel"]
    yield Rule.of(f"{theirs}.gate_up_proj", gate_up, Chain((Cut(-2, (width, width)), Swapped())))
    yield Rule.of(f"{theirs}.down_proj", "stack/{layer}/moe/down/kernel", Swapped())


def mixtral_rules(cfg: DecoderConfig, names: Collection[str]) -> list[Rule]:
    rules = [*outer_rules(cfg), *attention_rules(cfg)]
    if "model.layers.0.mlp.experts.gate_up_proj" in names:  # as transformers 5 holds them in memory
        fused = "model.layers.{layer}.mlp"
        return [*rules, *linear(f"{fused}.gate", "stack/{layer}/moe/router", bias=False),
                *fused_experts(f"{fused}.experts", cfg)]  # fmt: skip
    theirs = "model.layers.{layer}.block_sparse_moe"
    rules += linear(f"{theirs}.gate", "stack/{layer}/moe/router", bias=False)
    for name, number in (("gate", 1), ("down", 2), ("up", 3)):
        rules += linear(f"{theirs}.experts.{{expert}}.w{number}", f"stack/{{layer}}/moe/{name}", bias=False)
    return rules


def qwen3_moe_rules(cfg: DecoderConfig, names: Collection[str]) -> list[Rule]:
    theirs = "model.layers.{layer}.mlp"
    rules = [*outer_rules(cfg), *attention_rules(cfg)]
    rules += linear(f"{theirs}.gate", "stack/{layer}/moe/router", bias=False)
    if "model.layers.0.mlp.experts.gate_up_proj" in names:
        return [*rules, *fused_experts(f"{theirs}.experts", cfg)]
    for name in ("gate", "up", "down"):
        rules += linear(f"{theirs}.experts.{{expert}}.{name}_proj", f"stack/{{layer}}/moe/{name}", bias=False)
    return rules


MIXTRAL = Family("Mixtral", "MixtralForCausalLM", "mixtral", read_mixtral, write_mixtral, mixtral_rules)
QWEN3_MOE = Family(
    "Qwen 3 MoE", "Qwen3MoeForCausalLM", "qwen3_moe", read_qwen3_moe, write_qwen3_moe, qwen3_moe_rules
)
