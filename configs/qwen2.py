"""Qwen 2.5, seven sizes from 0.5B to 72B parameters: the LLaMA form, with biases on query, key and value.

Command    llm-jax train --config=qwen2:7b:h100x64 --config.data.path='train_*.bin'
Data       token files with Qwen's vocabulary (151,936 rows; 152,064 from 7B on), held-out ones as data.validation_path
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   MMLU 74.2 (7B, 5-shot) was published, on data and with a recipe that were not; the recipe here is LLaMA 2's
Source     Qwen team 2024, arXiv 2412.15115, table 1; config.json of Qwen2.5-0.5B to -72B
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

COLUMNS = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "tie_embeddings")
SIZES = {
    "0b5": (24, 896, 14, 2, 4_864, 151_936, True),
    "1b5": (28, 1_536, 12, 2, 8_960, 151_936, True),
    "3b": (36, 2_048, 16, 2, 11_008, 151_936, True),
    "7b": (28, 3_584, 28, 4, 18_944, 152_064, False),
    "14b": (48, 5_120, 40, 8, 13_824, 152_064, False),
    "32b": (64, 5_120, 40, 8, 27_648, 152_064, False),
    "72b": (80, 8_192, 64, 8, 29_568, 152_064, False),
}


def get_config(arg: str = "7b") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"qwen2:{size} is not one of {', '.join(SIZES)}"
    model = dict(zip(COLUMNS, SIZES[size], strict=True))
    model |= dict(bias="qkv", max_length=32_768, rope=dict(base=1_000_000.0), norm_eps=1e-6)
    return on_token_files(f"qwen2_{size}", machine, model, length=4_096, tokens=18_000_000_000_000, learning_rate=3e-4)
