"""Mistral 7B: 32 layers of 4,096, MLPs of 14,336, 32 heads, 8 for keys, a window of 4,096; 7,241,732,096 parameters.

Command    llm-jax train --config=mistral:7b:h100x64 --config.data.path='train_*.bin'
Data       token files with Mistral's vocabulary (32,000), held-out ones as data.validation_path
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   MMLU 60.1 (5-shot) was published, on data and with a recipe that were not; the recipe here is LLaMA 2's
Source     Jiang et al. 2023, arXiv 2310.06825, table 1; config.json of Mistral-7B-v0.1
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

SIZES = {"7b": dict(num_layers=32, embed_dim=4_096, num_heads=32, num_kv_heads=8, mlp_dim=14_336)}


def get_config(arg: str = "7b") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"mistral:{size} is not one of {', '.join(SIZES)}"
    model = SIZES[size] | dict(vocab_size=32_000, max_length=32_768, sliding_window=4_096, norm_eps=1e-5)
    return on_token_files(f"mistral_{size}", machine, model, length=4_096, tokens=2_000_000_000_000, learning_rate=3e-4)
