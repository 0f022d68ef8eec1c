"""Gemma 1, 2 and 3 (text): norms times 1 + w, GELU gates, embeddings times sqrt(D).

2 and 3 have norms round each part of a block, windows by layer and their own scale of the scores.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.config.kinds import layer_words
from llm_jax.convert.families.llama import (
    GATES,
    llama_rules,
    read_attention_bias,
    read_common,
    write_attention_bias,
    write_common,
)
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.keys import Keys, read_rope, rope_of, write_rope
from llm_jax.convert.windows import TYPES, read_words, window_keys, write_windows

TANH_GELU = "gelu_pytorch_tanh"


def read_every_gemma(keys: Keys, **defaults: Any) -> dict[str, Any]:
    """What the three have in common; `defaults` as of `read_common`."""
    keys.only("use_bidirectional_attention", None, False, reason="our decoder is causal")
    found = read_common(keys, head_dim=256, tied=True, **defaults)
    return found | {"bias": read_attention_bias(keys), "norm_scale": "zero", "embedding_scale": True}


def read_gemma(keys: Keys) -> dict[str, Any]:
    keys.only("hidden_activation", None, TANH_GELU, reason="only some readers follow it: hidden_act should say it")
    meant = GATES | {"gelu": "geglu"}  # the first checkpoints say gelu and mean its tanh form
    return read_every_gemma(keys, kv_heads=16, max_length=8192, activation=("hidden_act", TANH_GELU), gates=meant)


def write_gemma(cfg: DecoderConfig) -> dict[str, Any]:
    return write_common(cfg) | write_attention_bias(cfg)


def read_later(
    keys: Keys, *, full_every: int, final_cap: float | None, max_length: int, rope: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What Gemma 2 and 3 share.

    Args:
      full_every: of so many layers the last one sees all, where `layer_types` is left out.
      final_cap: their default of `final_logit_softcapping`.
      rope: in place of what the usual keys say.
    """
    keys.ignore("hidden_act")  # hidden_activation is read
    activation = ("hidden_activation", TANH_GELU)
    found = read_every_gemma(keys, kv_heads=4, max_length=max_length, activation=activation, rope=rope)
    layers, window = found["num_layers"], keys.take("sliding_window", 4096)
    keys.only("sliding_window_size", None, window, reason="sliding_window is read, and says something else")
    default = [TYPES["window" if (layer + 1) % full_every else "full"] for layer in range(layers)]
    scalar, head_dim = keys.take("query_pre_attn_scalar", 256), found["head_dim"]
    return found | window_keys(read_words(keys, layers, window, default), window) | {
        "norm_placement": "sandwich",
        "attention_scale": 0.0 if scalar == head_dim else scalar**-0.5,
        "logits_softcap": keys.take("final_logit_softcapping", final_cap) or 0.0,
    }  # fmt: skip


def write_later(cfg: DecoderConfig) -> dict[str, Any]:
    written = write_common(cfg) | write_windows(cfg) | write_attention_bias(cfg)
    scale = cfg.attention_scale or function_of(cfg).head_dim ** -0.5
    return written | {
        "hidden_activation": written.pop("hidden_act"),
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": cfg.logits_softcap or None,
    }


def read_gemma2(keys: Keys) -> dict[str, Any]:
    cap = keys.take("attn_logit_softcapping", 50.0) or 0.0
    return read_later(keys, full_every=2, final_cap=30.0, max_length=8192) | {"attention_softcap": cap}


def write_gemma2(cfg: DecoderConfig) -> dict[str, Any]:
    return write_later(cfg) | {"attn_logit_softcapping": cfg.attention_softcap or None}


def read_gemma3(keys: Keys) -> dict[str, Any]:
    keys.ignore("_sliding_window_pattern")  # transformers 5 writes it and does not read it
    keys.only("attn_logit_softcapping", None, reason="transformers' own Gemma 3 does not cap scores")
    rope, local = read_both_ropes(keys)
    every = keys.take("sliding_window_pattern", 6)
    found = read_later(keys, full_every=every, final_cap=None, max_length=131_072, rope=rope)
    return found | {"qk_norm": "head", "window_rope_base": local if found["sliding_window"] else 0.0}


def read_both_ropes(keys: Keys) -> tuple[dict[str, Any], float]:
    """`model.rope`, that of the layers that see all, and the base of those with a window, which is never scaled."""
    groups = keys.take("rope_parameters", None)
    local_base = keys.take("rope_local_base_freq", 10_000.0)
    if groups is None:
        return read_rope(keys, base=1e6), local_base
    keys.ignore("rope_theta", "rope_scaling")
    if not isinstance(groups, Mapping) or set(groups) - {"full_attention", "sliding_attention"}:
        raise keys.refuse(
            "rope_parameters", groups, "it holds a group for full_attention and one for sliding_attention"
        )
    full, local = (groups.get(name) or {} for name in ("full_attention", "sliding_attention"))
    rope = rope_of(keys, "rope_parameters", full, 1e6, 1.0)
    window_rope = rope_of(keys, "rope_parameters", local, local_base, 1.0)
    if set(window_rope) != {"base", "fraction"} or {rope["fraction"], window_rope["fraction"]} != {1.0}:
        reason = "layers with a window rotate unscaled in our model, and all of each head rotates"
        raise keys.refuse("rope_parameters", groups, reason)
    return rope, window_rope["base"]


def write_gemma3(cfg: DecoderConfig) -> dict[str, Any]:
    """`sliding_window_pattern` is what readers before transformers 4.53 know."""
    words = layer_words(cfg)
    period = words.index("full") + 1 if "full" in words else len(words) + 1
    regular = all((word == "full") == ((layer + 1) % period == 0) for layer, word in enumerate(words))
    pattern = {"sliding_window_pattern": period} if regular else {}
    local = cfg.window_rope_base or cfg.rope.base
    return write_later(cfg) | write_rope(cfg.rope) | {"rope_local_base_freq": local} | pattern


GEMMA = Family("Gemma", "GemmaForCausalLM", "gemma", read_gemma, write_gemma, llama_rules)
GEMMA2 = Family("Gemma 2", "Gemma2ForCausalLM", "gemma2", read_gemma2, write_gemma2, llama_rules)
GEMMA3 = Family("Gemma 3 (text)", "Gemma3ForCausalLM", "gemma3_text", read_gemma3, write_gemma3, llama_rules)
