"""LLaMA and what is named like it: RMSNorm, rotary, gated MLP.

Mistral and Ministral have windows, SmolLM3 layers without positions, OLMo 2 norms of what a part gives, Phi-3 fused
projections.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.config.kinds import layer_words
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.keys import Keys, read_rope, write_rope
from llm_jax.convert.rules import Rule, fused_linear, linear
from llm_jax.convert.windows import read_words, window_keys, write_windows

GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
GATE_NAMES = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
# Their norms of a layer and ours, by model.norm_placement.
NORMS = {
    "pre": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "output": {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "mlp_norm"},
    "sandwich": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_output_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_output_norm",
    },
}

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
    activation: tuple[str, str] = ("hidden_act", "silu"),
    gates: Mapping[str, str] = GATES,
    partial: bool = False,
    rope: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The keys that all of the line share.

    Args:
      mlp_dim, activation: the keys that say it.
      gates: our words for theirs of the activation.
      partial: heads may rotate in part.
      rope: `model.rope`, in place of what the usual keys say.
      others: the family's own defaults in transformers.
    """
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
        "rope": read_rope(keys, base=base, partial=partial) if rope is None else rope,
        "norm": "rmsnorm",
        "norm_eps": keys.take("rms_norm_eps", norm_eps),
        "activation": keys.choice(activation[0], gates, activation[1]),
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


def read_attention_bias(keys: Keys) -> str:
    """`model.bias` of a family whose MLPs have none."""
    return "attention" if keys.take("attention_bias", False) else "none"


def write_attention_bias(cfg: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": cfg.bias in ("attention", "all")}


def read_biases(keys: Keys) -> str:
    attention, mlp = read_attention_bias(keys), keys.take("mlp_bias", False)
    if mlp and attention == "none":
        raise keys.refuse("mlp_bias", mlp, "attention_bias is False, and our model has no biases of MLPs alone")
    return "all" if mlp else attention


def write_biases(cfg: DecoderConfig) -> dict[str, Any]:
    return write_attention_bias(cfg) | {"mlp_bias": cfg.bias == "all"}


def read_llama(keys: Keys) -> dict[str, Any]:
    return read_common(keys) | {"bias": read_biases(keys)}


def write_llama(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg) | write_biases(cfg)


def read_mistral(keys: Keys) -> dict[str, Any]:
    window, found = keys.take("sliding_window", 4096), read_common(keys, kv_heads=8, max_length=131_072)
    alike = "sliding_attention" if window else "full_attention"
    types = keys.take("layer_types", None) or []
    if set(types) - {alike}:
        reason = (
            f"transformers' own Mistral does not read it, and has {alike} in every layer; MinistralForCausalLM reads it"
        )
        raise keys.refuse("layer_types", types, reason)
    return found | {"sliding_window": window or 0}


def write_mistral(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg) | {"sliding_window": cfg.sliding_window or None}


def read_ministral(keys: Keys) -> dict[str, Any]:
    window, found = keys.take("sliding_window", 4096), read_common(keys, kv_heads=8, max_length=131_072)
    layers = found["num_layers"]
    words = read_words(keys, layers, window, ["sliding_attention" if window else "full_attention"] * layers)
    return found | window_keys(words, window)


def write_ministral(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg) | write_windows(cfg)


def read_smollm3(keys: Keys) -> dict[str, Any]:
    found = read_common(keys, kv_heads=4, base=2e6, max_length=32_768, tied=True)
    layers, interval = found["num_layers"], keys.take("no_rope_layer_interval", 4)
    rotating = keys.take("no_rope_layers", None)  # 1: the layer does have positions
    if rotating is None:
        rotating = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(rotating) < layers:
        raise keys.refuse("no_rope_layers", rotating, f"it has a number for each of the {layers} layers")
    keys.ignore("max_window_layers")  # not read there
    window = keys.take("sliding_window", None)
    window = window if keys.take("use_sliding_window", False) else None
    default = ["full_attention" if rotates or not window else "sliding_attention" for rotates in rotating[:layers]]
    words = read_words(keys, layers, window, default)
    for layer, word in enumerate(words):
        if not rotating[layer] and word == "window":
            raise keys.refuse(
                "no_rope_layers", rotating, f"layer {layer} has a window, and ours with one have positions"
            )
        words[layer] = word if rotating[layer] else "full_without_positions"
    return found | window_keys(words, window) | {"bias": read_biases(keys)}


def write_smollm3(cfg: DecoderConfig) -> dict[str, Any]:
    written = write_common(cfg) | write_windows(cfg) | write_biases(cfg)
    del written["head_dim"]  # hidden_size / num_attention_heads there
    rotating = [int(word != "full_without_positions") for word in layer_words(cfg)]
    return written | {"no_rope_layers": rotating, "use_sliding_window": bool(cfg.sliding_window)}


def read_olmo2(keys: Keys) -> dict[str, Any]:
    found = read_common(keys, norm_eps=1e-5)
    return found | {"bias": read_attention_bias(keys), "norm_placement": "output", "qk_norm": "all"}


def write_olmo2(cfg: DecoderConfig) -> dict[str, Any]:
    written = write_common(cfg) | write_attention_bias(cfg)
    del written["head_dim"]  # hidden_size / num_attention_heads there
    return written


def read_phi3(keys: Keys) -> dict[str, Any]:
    keys.ignore("original_max_position_embeddings", "embd_pdrop")  # read by longrope alone; not read at all
    keys.only("attention_bias", False, default=False, reason="transformers' own Phi-3 has no biases")
    residual = keys.take("resid_pdrop", 0.0)
    found = read_common(keys, max_length=4096, norm_eps=1e-5, partial=True)
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
        yield from linear(f"{theirs}.{short}_proj", f"{ours}/{name}", bias=cfg.bias != "none")
    yield from linear(f"{theirs}.o_proj", f"{ours}/out", bias=cfg.bias in ("attention", "all"))
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
    for theirs, ours in NORMS[cfg.norm_placement].items():
        yield Rule.of(f"model.layers.{{layer}}.{theirs}.weight", f"stack/{{layer}}/{ours}/scale")
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
MINISTRAL = Family("Ministral", "MinistralForCausalLM", "ministral", read_ministral, write_ministral, llama_rules)
SMOLLM3 = Family("SmolLM3", "SmolLM3ForCausalLM", "smollm3", read_smollm3, write_smollm3, llama_rules)
OLMO2 = Family("OLMo 2", "Olmo2ForCausalLM", "olmo2", read_olmo2, write_olmo2, llama_rules)
PHI3 = Family("Phi-3", "Phi3ForCausalLM", "phi3", read_phi3, write_phi3, phi3_rules)
