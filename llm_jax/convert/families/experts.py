"""Mixtures of experts of the LLaMA line: Mixtral, Qwen 3 MoE. Softmax over all experts, then the likeliest k."""

from collections.abc import Collection, Iterator
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.convert.families.llama import (
    attention_rules,
    mlp_rules,
    outer_rules,
    read_attention_bias,
    read_common,
    write_attention_bias,
    write_common,
)
from llm_jax.convert.family import Family, function_of
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
    dense = keys.take("mlp_only_layers", None) or []
    if dense != list(range(len(dense))):
        reason = "our model can have MLPs in place of experts in the first layers alone"
        raise keys.refuse("mlp_only_layers", dense, reason)
    moe = {
        "expert_dim": keys.take("moe_intermediate_size"),
        "dense_layers": len(dense),
        "num_experts": keys.take("num_experts", keys.take("num_local_experts", 128)),  # transformers 4, 5
        "top_k": keys.take("num_experts_per_tok", 8),
        "renormalize": keys.take("norm_topk_prob", False),
        "balance_loss": keys.take("router_aux_loss_coef", 0.001),
    }
    keys.ignore("intermediate_size")  # of layers without experts
    found = read_common(keys, mlp_dim=mlp_key(len(dense)), kv_heads=4, max_length=32_768)
    window = keys.take("sliding_window", 4096)
    window = window if keys.take("use_sliding_window", False) else None
    alike = "sliding_attention" if window else "full_attention"
    types, begins = keys.take("layer_types", None), keys.take("max_window_layers", 0)
    if set(types or ()) - {alike}:
        raise keys.refuse("layer_types", types, f"transformers' own Qwen 3 MoE has {alike} in every layer")
    if window and begins:  # versions of transformers differ in whether they read it
        raise keys.refuse("max_window_layers", begins, "the window is that of every layer here, from layer 0 on")
    bias = read_attention_bias(keys)
    return found | {"moe": moe, "qk_norm": "head", "bias": bias, "sliding_window": window or 0}


def write_qwen3_moe(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg, mlp_dim=mlp_key(cfg.moe.dense_layers)) | write_attention_bias(cfg) | {
        "moe_intermediate_size": function_of(cfg).moe.expert_dim,
        "use_sliding_window": bool(cfg.sliding_window),
        "sliding_window": cfg.sliding_window or None,
        "num_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.top_k,
        "norm_topk_prob": cfg.moe.renormalize,
        "router_aux_loss_coef": cfg.moe.balance_loss,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(cfg.moe.dense_layers)),
    }  # fmt: skip


def mlp_key(dense_layers: int) -> str:
    """Which key says `model.mlp_dim`: where no layer has an MLP, it is the experts' width."""
    return "intermediate_size" if dense_layers else "moe_intermediate_size"


def fused_experts(theirs: str, cfg: DecoderConfig) -> Iterator[Rule]:
    """All experts of a layer in two tensors: gate and up side by side, (E, 2 F, D), and down (E, D, F)."""
    width = function_of(cfg).moe.expert_dim
    gate_up = ["stack/{layer}/moe/gate/kernel", "stack/{layer}/moe/up/kernel"]
    yield Rule.of(f"{theirs}.gate_up_proj", gate_up, Chain((Cut(-2, (width, width)), Swapped())))
    yield Rule.of(f"{theirs}.down_proj", "stack/{layer}/moe/down/kernel", Swapped())


def expert_rules(cfg: DecoderConfig, names: Collection[str]) -> Iterator[Rule]:
    """Router and experts as Qwen and DeepSeek name them."""
    theirs = "model.layers.{layer}.mlp"
    yield from linear(f"{theirs}.gate", "stack/{layer}/moe/router", bias=False)
    if any(name.endswith(".mlp.experts.gate_up_proj") for name in names):  # as transformers 5 holds them in memory
        yield from fused_experts(f"{theirs}.experts", cfg)
        return
    for name in ("gate", "up", "down"):
        yield from linear(f"{theirs}.experts.{{expert}}.{name}_proj", f"stack/{{layer}}/moe/{name}", bias=False)


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
    dense = mlp_rules(cfg) if cfg.moe.dense_layers else ()
    return [*outer_rules(cfg), *attention_rules(cfg), *expert_rules(cfg, names), *dense]


MIXTRAL = Family("Mixtral", "MixtralForCausalLM", "mixtral", read_mixtral, write_mixtral, mixtral_rules)
QWEN3_MOE = Family("Qwen 3 MoE", "Qwen3MoeForCausalLM", "qwen3_moe", read_qwen3_moe, write_qwen3_moe, qwen3_moe_rules)
