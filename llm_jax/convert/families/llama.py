"""LLaMA and what is named like it: Mistral (a window), Phi-3 (fused projections). RMSNorm, rotary, gated MLP."""

from collections.abc import Collection, Iterator
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.keys import Keys, read_rope, write_rope
from llm_jax.convert.rules import Rule, fused_linear, linear

GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
GATE_NAMES = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
ONE_BIAS = "model.bias can be none, qkv (query, key, value) or all, and this asks for biases of other layers alone"

# ------------------------------------------------------------------------------------------------- configs


def read_common(
    keys: Keys,
    *,
    mlp_dim: str = "intermediate_size",
    kv_heads: int | None = None,
    head_dim: int | None = None,
    base: float = 10_000.0,
    max_length: int = 2048,
    norm_eps: float = 1e-6,
    tied: bool = False,
) -> dict[str, Any]:
    """The keys that all of the line share; the arguments are a family's own defaults in transformers."""
    heads = keys.take("num_attention_heads")
    return {
        "vocab_size": keys.take("vocab_size"),
        "num_layers": keys.take("num_hidden_layers"),
        "embed_dim": keys.take("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": keys.take("num_key_value_heads", kv_heads) or heads,
        "head_dim": keys.take("head_dim", head_dim) or 0,
        "mlp_dim": keys.take(mlp_dim),
        "max_length": keys.take("max_position_embeddings", max_length),
        "positions": "rotary",
        "rope": read_rope(keys, base=base),
        "norm": "rmsnorm",
        "norm_eps": keys.take("rms_norm_eps", norm_eps),
        "activation": keys.choice("hidden_act", GATES, "silu"),
        "tie_embeddings": keys.take("tie_word_embeddings", tied),
        "init_std": keys.take("initializer_range", 0.02),
        "dropout": {"attention": keys.take("attention_dropout", 0.0)},
    }


def write_common(cfg: DecoderConfig, *, mlp_dim: str = "intermediate_size") -> dict[str, Any]:
    says = function_of(cfg)
    return {
        "vocab_size": says.vocab_size,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.embed_dim,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": says.num_kv_heads,
        "head_dim": says.head_dim,
        mlp_dim: says.mlp_dim,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": GATE_NAMES.get(cfg.activation, cfg.activation),
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "attention_dropout": cfg.dropout.attention,
    } | write_rope(cfg.rope)


def read_llama(keys: Keys) -> dict[str, Any]:
    attention, mlp = keys.take("attention_bias", False), keys.take("mlp_bias", False)
    if attention != mlp:
        raise keys.refuse("attention_bias", attention, f"mlp_bias is {mlp}: {ONE_BIAS}")
    return read_common(keys) | {"bias": "all" if mlp else "none"}


def write_llama(cfg: DecoderConfig) -> dict[str, Any]:
    bias = cfg.bias == "all"
    return write_common(cfg) | {"attention_bias": bias, "mlp_bias": bias}


def read_mistral(keys: Keys) -> dict[str, Any]:
    window = keys.take("sliding_window", 4096)
    return read_common(keys, kv_heads=8, max_length=131_072) | {"sliding_window": window or 0}


def write_mistral(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg) | {"sliding_window": cfg.sliding_window or None}


def read_phi3(keys: Keys) -> dict[str, Any]:
    keys.ignore("original_max_position_embeddings", "embd_pdrop")  # read by longrope alone; not read at all
    keys.only("attention_bias", False, default=False, reason="transformers' own Phi-3 has no biases")
    residual = keys.take("resid_pdrop", 0.0)
    found = read_common(keys, max_length=4096, norm_eps=1e-5)
    found["dropout"] |= {"attention_output": residual, "mlp_output": residual}
    return found | {"sliding_window": keys.take("sliding_window", None) or 0}


def write_phi3(cfg: DecoderConfig) -> dict[str, Any]:
    written = write_common(cfg)
    del written["head_dim"]  # always hidden_size / num_attention_heads there
    return written | {"resid_pdrop": cfg.dropout.mlp_output, "sliding_window": cfg.sliding_window or None}


# -------------------------------------------------------------------------------------------------- tables


def attention_rules(cfg: DecoderConfig) -> Iterator[Rule]:
    theirs, ours = "model.layers.{layer}.self_attn", "stack/{layer}/attention"
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        yield from linear(f"{theirs}.{short}_proj", f"{ours}/{name}", bias=cfg.bias in ("qkv", "all"))
    yield from linear(f"{theirs}.o_proj", f"{ours}/out", bias=cfg.bias == "all")
    if cfg.qk_norm != "none":
        yield Rule.of(f"{theirs}.q_norm.weight", f"{ours}/query_norm/scale")
        yield Rule.of(f"{theirs}.k_norm.weight", f"{ours}/key_norm/scale")


def mlp_rules(cfg: DecoderConfig) -> Iterator[Rule]:
    for name in ("gate", "up", "down"):
        theirs = f"model.layers.{{layer}}.mlp.{name}_proj"
        yield from linear(theirs, f"stack/{{layer}}/mlp/{name}", bias=cfg.bias == "all")


def outer_rules(cfg: DecoderConfig) -> Iterator[Rule]:
    """Everything but attention and MLP."""
    yield Rule.of("model.embed_tokens.weight", "embedding/table")
    yield Rule.of("model.layers.{layer}.input_layernorm.weight", "stack/{layer}/attention_norm/scale")
    yield Rule.of("model.layers.{layer}.post_attention_layernorm.weight", "stack/{layer}/mlp_norm/scale")
    yield Rule.of("model.norm.weight", "final_norm/scale")
    if not cfg.tie_embeddings:
        yield from linear("lm_head", "head", bias=False)


def llama_rules(cfg: DecoderConfig, names: Collection[str]) -> list[Rule]:
    return [*outer_rules(cfg), *attention_rules(cfg), *mlp_rules(cfg)]


def phi3_rules(cfg: DecoderConfig, names: Collection[str]) -> list[Rule]:
    says = function_of(cfg)
    block, ours = "model.layers.{layer}", "stack/{layer}"
    heads = tuple(count * says.head_dim for count in (cfg.num_heads, says.num_kv_heads, says.num_kv_heads))
    query_key_value = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
    return [
        *outer_rules(cfg),
        *fused_linear(f"{block}.self_attn.qkv_proj", query_key_value, heads, bias=False),
        *linear(f"{block}.self_attn.o_proj", f"{ours}/attention/out", bias=False),
        *fused_linear(
            f"{block}.mlp.gate_up_proj", [f"{ours}/mlp/gate", f"{ours}/mlp/up"], (says.mlp_dim,) * 2, bias=False
        ),
        *linear(f"{block}.mlp.down_proj", f"{ours}/mlp/down", bias=False),
    ]


LLAMA = Family("LLaMA 2, 3, 3.1, 3.3; SmolLM2", "LlamaForCausalLM", "llama", read_llama, write_llama, llama_rules)
MISTRAL = Family("Mistral", "MistralForCausalLM", "mistral", read_mistral, write_mistral, llama_rules)
PHI3 = Family("Phi-3", "Phi3ForCausalLM", "phi3", read_phi3, write_phi3, phi3_rules)
