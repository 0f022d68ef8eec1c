"""Qwen 2 and 2.5 (biases on query, key and value), Qwen 3 (norms on query and key heads)."""

from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.config.kinds import layer_words
from llm_jax.convert.families.llama import (
    llama_rules,
    read_attention_bias,
    read_common,
    write_attention_bias,
    write_common,
)
from llm_jax.convert.family import Family
from llm_jax.convert.keys import Keys
from llm_jax.convert.windows import read_words, window_keys, write_windows


def read_qwen_windows(keys: Keys, layers: int) -> dict[str, Any]:
    """Layers have a window from `max_window_layers` on, where `layer_types` does not say which."""
    window, begins = keys.take("sliding_window", 4096), keys.take("max_window_layers", 28)
    window = window if keys.take("use_sliding_window", False) else None
    default = ["sliding_attention" if window and layer >= begins else "full_attention" for layer in range(layers)]
    return window_keys(read_words(keys, layers, window, default), window)


def write_qwen_windows(cfg: DecoderConfig) -> dict[str, Any]:
    """In both ways where the layers with a window are the last ones, as older readers have it."""
    written = write_windows(cfg) | {"use_sliding_window": bool(cfg.sliding_window)}
    words = layer_words(cfg)
    begins = words.index("window") if "window" in words else len(words)
    if set(words[begins:]) <= {"window"}:
        written["max_window_layers"] = begins
    return written


def read_qwen2(keys: Keys) -> dict[str, Any]:
    found = read_common(keys, kv_heads=32, max_length=32_768)
    return found | {"bias": "qkv"} | read_qwen_windows(keys, found["num_layers"])


def write_qwen2(cfg: DecoderConfig) -> dict[str, Any]:
    written = write_common(cfg) | write_qwen_windows(cfg)
    del written["head_dim"]  # hidden_size / num_attention_heads there
    return written


def read_qwen3(keys: Keys) -> dict[str, Any]:
    found = read_common(keys, kv_heads=32, head_dim=128, max_length=32_768)
    windows = read_qwen_windows(keys, found["num_layers"])
    return found | {"qk_norm": "head", "bias": read_attention_bias(keys)} | windows


def write_qwen3(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg) | write_qwen_windows(cfg) | write_attention_bias(cfg)


QWEN2 = Family("Qwen 2, 2.5", "Qwen2ForCausalLM", "qwen2", read_qwen2, write_qwen2, llama_rules)
QWEN3 = Family("Qwen 3", "Qwen3ForCausalLM", "qwen3", read_qwen3, write_qwen3, llama_rules)
