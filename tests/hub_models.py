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
    "Mistral with a window": ("Mistral", LINE | dict(sliding_window=5, num_key_value_heads=1, head_dim=10)),
    "Mixtral": ("Mixtral", LINE | dict(num_local_experts=3)),
    "Qwen 2, tied": ("Qwen2", LINE | dict(tie_word_embeddings=True)),
    "Qwen 2.5 with YaRN": ("Qwen2", LINE | dict(rope_parameters=YARN)),
    "Qwen 3": ("Qwen3", LINE | dict(head_dim=16)),
    "Qwen 3 MoE": ("Qwen3Moe", LINE | EXPERTS | dict(norm_topk_prob=True)),
    "Qwen 3 MoE, not renormalised": ("Qwen3Moe", LINE | EXPERTS | dict(norm_topk_prob=False)),
    "Phi-3": ("Phi3", LINE | dict(sliding_window=None, resid_pdrop=0.1)),
    "Phi-3 mini, a window, part of a head rotates": (
        "Phi3",
        LINE | dict(sliding_window=7,
                    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    ),
}  # fmt: skip


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
