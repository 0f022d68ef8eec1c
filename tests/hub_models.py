"""Tiny checkpoints of every family as the hub has them, made without torch: their config.json and the names and shapes
of their tensors are stored in golden/convert_models.json, their numbers follow from the names alone."""

import json
import pathlib
import zlib

import ml_dtypes
import numpy as np

from llm_jax.convert import safetensors
from llm_jax.convert.safetensors import Planned

GOLDEN = pathlib.Path(__file__).with_name("golden")
MODELS, LOGITS = GOLDEN / "convert_models.json", GOLDEN / "convert_logits.npz"
LENGTH = 16  # of the stored prompt
CONTEXT = 96

LINE = dict(
    vocab_size=61, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GPT2 = dict(vocab_size=61, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=12, low_freq_factor=1.0,
    high_freq_factor=4.0,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=12)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)
LONGER = LINE | dict(num_hidden_layers=3)
EVERY_OTHER = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA2 = LONGER | dict(
    num_key_value_heads=1, head_dim=12, query_pre_attn_scalar=20, sliding_window=5, attn_logit_softcapping=1.5,
    final_logit_softcapping=4.0, tie_word_embeddings=True,
)  # fmt: skip
GEMMA3 = LINE | dict(
    num_hidden_layers=4, head_dim=12, query_pre_attn_scalar=12, sliding_window=5, sliding_window_pattern=3,
    tie_word_embeddings=True,
    rope_parameters=dict(
        full_attention=dict(rope_type="linear", rope_theta=1e4, factor=4.0),
        sliding_attention=dict(rope_type="default", rope_theta=300.0),
    ),
)  # fmt: skip
NEOX = {key: value for key, value in LINE.items() if key != "num_key_value_heads"} | dict(intermediate_size=72)
DEEPSEEK = LINE | dict(
    num_key_value_heads=4, num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=6, num_experts_per_tok=2,
    n_shared_experts=2, moe_intermediate_size=12, kv_lora_rank=10, q_lora_rank=14, qk_nope_head_dim=8,
    qk_rope_head_dim=6, v_head_dim=11, n_group=1, topk_group=1,
)  # fmt: skip
DEEPSEEK_V3 = DEEPSEEK | dict(
    n_shared_experts=1, routed_scaling_factor=2.5, num_mtp_layers=0, kv_lora_rank=9, qk_nope_head_dim=7,
)  # fmt: skip
GPT_OSS = LINE | dict(
    num_hidden_layers=3, num_local_experts=5, num_experts_per_tok=2, sliding_window=5, head_dim=12,
    intermediate_size=20, rope_parameters=YARN | dict(truncate=False, beta_fast=20.0),
)  # fmt: skip

CASES = {  # name: (transformers' class of the config, its values)
    "GPT-2": ("GPT2", GPT2 | dict(n_inner=72)),
    "GPT-2, head untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False, activation_function="relu")),
    "LLaMA 2": ("Llama", LINE | dict(num_key_value_heads=4)),
    "LLaMA 3.1, tied": ("Llama", LINE | dict(rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=12)),
    "LLaMA with biases, linear scaling": (
        "Llama",
        LINE | dict(attention_bias=True, mlp_bias=True,
                    rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    ),
    "LLaMA with biases of attention, YaRN by its own factor": (
        "Llama",
        LINE | dict(attention_bias=True, rope_parameters=YARN | dict(attention_factor=1.3, truncate=False)),
    ),
    "Mistral with a window": ("Mistral", LINE | dict(sliding_window=5, num_key_value_heads=1, head_dim=10)),
    "Ministral, every other layer with a window": (
        "Ministral", LONGER | dict(sliding_window=5, layer_types=EVERY_OTHER, head_dim=10),
    ),
    "Mixtral": ("Mixtral", LINE | dict(num_local_experts=3)),
    "Qwen 2, tied": ("Qwen2", LINE | dict(tie_word_embeddings=True)),
    "Qwen 2.5 with YaRN": ("Qwen2", LINE | dict(rope_parameters=YARN)),
    "Qwen 2, windows from a layer on": (
        "Qwen2", LONGER | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "Qwen 3 with biases, every other layer with a window": (
        "Qwen3",
        LONGER | dict(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=5,
                      layer_types=EVERY_OTHER),
    ),
    "Qwen 3": ("Qwen3", LINE | dict(head_dim=16)),
    "Qwen 3 MoE": ("Qwen3Moe", LINE | EXPERTS | dict(norm_topk_prob=True)),
    "Qwen 3 MoE, not renormalised": ("Qwen3Moe", LINE | EXPERTS | dict(norm_topk_prob=False)),
    "Phi-3": ("Phi3", LINE | dict(sliding_window=None, resid_pdrop=0.1)),
    "Phi-3 mini, a window, part of a head rotates": (
        "Phi3",
        LINE | dict(sliding_window=7,
                    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    ),
    "SmolLM3": ("SmolLM3", LONGER | dict(no_rope_layers=[1, 0, 1], tie_word_embeddings=True)),
    "SmolLM3 with windows and biases": (
        "SmolLM3",
        LONGER | dict(no_rope_layers=[1, 1, 0], use_sliding_window=True, sliding_window=5, attention_bias=True,
                      mlp_bias=True, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "OLMo 2": ("Olmo2", LINE),
    "OLMo 2 with biases, tied": ("Olmo2", LINE | dict(attention_bias=True, tie_word_embeddings=True)),
    "Gemma": ("Gemma", LINE | dict(num_key_value_heads=1, head_dim=12, tie_word_embeddings=True)),
    "Gemma with biases, head untied": ("Gemma", LINE | dict(head_dim=8, attention_bias=True)),
    "Gemma 2": ("Gemma2", GEMMA2),
    "Gemma 2 without caps": (
        "Gemma2", GEMMA2 | dict(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=12),
    ),
    "Gemma 3": ("Gemma3Text", GEMMA3),
    "Gemma 3, head untied": (
        "Gemma3Text",
        GEMMA3 | dict(query_pre_attn_scalar=20, tie_word_embeddings=False, final_logit_softcapping=3.0,
                      rope_parameters=None, layer_types=[*EVERY_OTHER, "sliding_attention"]),
    ),
    "Pythia": ("GPTNeoX", NEOX),
    "GPT-NeoX, attention before the MLP, tied": (
        "GPTNeoX",
        NEOX | dict(use_parallel_residual=False, tie_word_embeddings=True, hidden_act="gelu_new",
                    rope_parameters=dict(rope_type="linear", rope_theta=1e3, factor=2.0, partial_rotary_factor=1.0)),
    ),
    "DeepSeek-V2 Lite": (
        "DeepseekV2",
        DEEPSEEK | dict(q_lora_rank=None, num_attention_heads=3, num_key_value_heads=3, hidden_size=36),
    ),
    "DeepSeek-V2, groups, scaled YaRN": (
        "DeepseekV2",
        DEEPSEEK | dict(topk_method="group_limited_greedy", n_group=3, topk_group=2, num_experts_per_tok=3,
                        routed_scaling_factor=4.0, first_k_dense_replace=0,
                        rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.9)),
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        DEEPSEEK_V3 | dict(n_group=3, topk_group=2, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    ),
    "DeepSeek-V3, no groups, not renormalised": (
        "DeepseekV3",
        DEEPSEEK_V3 | dict(n_group=1, topk_group=1, q_lora_rank=None, norm_topk_prob=False, n_shared_experts=2),
    ),
    "GPT-OSS": ("GptOss", GPT_OSS),
    "GPT-OSS, one window, tied": (
        "GptOss",
        GPT_OSS | dict(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], head_dim=10,
                       tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    ),
}  # fmt: skip

# What transformers calls the model, where that is not the config's name and ForCausalLM.
MODEL_CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def model_class(kind: str) -> str:
    """Of a case's first entry."""
    return MODEL_CLASSES.get(kind, f"{kind}ForCausalLM")


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """A float32 array for each name: small normal numbers, norm scales round 1."""
    made = {}
    for name, shape in shapes.items():
        values = 0.15 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        is_scale = name.endswith("norm.weight") or ".ln_" in name and name.endswith("weight")
        made[name] = (values + is_scale).astype(np.float32)
    return made


def tokens(rows: int = 1, length: int = LENGTH, seed: int = 3) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 61, (rows, length)).astype(np.int32)


def write(
    folder: pathlib.Path,
    config: dict,
    arrays: dict[str, np.ndarray],
    *,
    dtype: str = "float32",
    largest: int = 1 << 40,
) -> pathlib.Path:
    """A checkpoint's folder; `largest`: bytes of a shard."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    planned = [Planned(name, kind, array.shape) for name, array in arrays.items()]
    safetensors.write_folder(folder, planned, lambda tensor: arrays[tensor.name].astype(kind), largest=largest)
    return folder


def stored(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and tensors of a case."""
    entry = json.loads(MODELS.read_text())[name]
    return entry["config"], weights(entry["tensors"])


def checkpoint(folder: pathlib.Path, name: str, **options) -> pathlib.Path:
    config, arrays = stored(name)
    return write(folder, config, arrays, **options)


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in safetensors.read_folder(folder).items()}
