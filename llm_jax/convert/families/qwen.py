"""Qwen 2 and 2.5 (biases on query, key and value), Qwen 3 (norms on query and key heads)."""

from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.convert.family import Family
from llm_jax.convert.families.llama import llama_rules, read_common, write_common
from llm_jax.convert.keys import Keys


def read_window(keys: Keys, layers: int, default: int) -> int:
    """Our window is that of all layers; theirs may begin at a layer, so it is all, none, or refused."""
    window, begins = keys.take("sliding_window", None), keys.take("max_window_layers", default)
    kinds = keys.take("layer_types", None)
    if not keys.take("use_sliding_window", False) or window is None:
        kinds_allowed, found = {"full_attention"}, 0
    else:
        if kinds is None and 0 < begins < layers:
            raise keys.refuse("max_window_layers", begins, "our model has the same window in every layer")
        kinds = kinds or ["sliding_attention" if begins == 0 else "full_attention"] * layers
        kinds_allowed, found = set(kinds[:1]), window if kinds[0] == "sliding_attention" else 0
    if kinds is not None and set(kinds) - kinds_allowed:
        raise keys.refuse("layer_types", kinds, "our model has the same window in every layer")
    return found


def write_window(cfg: DecoderConfig) -> dict[str, Any]:
    if not cfg.sliding_window:
        return {"use_sliding_window": False, "sliding_window": None}
    return {"use_sliding_window": True, "sliding_window": cfg.sliding_window, "max_window_layers": 0}


def read_qwen2(keys: Keys) -> dict[str, Any]:
    found = read_common(keys, kv_heads=32, max_length=32_768)
    return found | {"bias": "qkv", "sliding_window": read_window(keys, found["num_layers"], 28)}


def write_qwen2(cfg: DecoderConfig) -> dict[str, Any]:
    written = write_common(cfg) | write_window(cfg)
    del written["head_dim"]  # hidden_size / num_attention_heads there
    return written


def read_qwen3(keys: Keys) -> dict[str, Any]:
    reason = "model.bias can be none, qkv or all, and this asks for biases of query, key, value and output alone"
    keys.only("attention_bias", False, default=False, reason=reason)
    found = read_common(keys, kv_heads=32, head_dim=128, max_length=32_768)
    return found | {"qk_norm": "head", "sliding_window": read_window(keys, found["num_layers"], 28)}


def write_qwen3(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg) | write_window(cfg) | {"attention_bias": False}


QWEN2 = Family("Qwen 2, 2.5", "Qwen2ForCausalLM", "qwen2", read_qwen2, write_qwen2, llama_rules)
QWEN3 = Family("Qwen 3", "Qwen3ForCausalLM", "qwen3", read_qwen3, write_qwen3, llama_rules)
