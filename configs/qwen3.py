"""Qwen 3, six dense sizes from 0.6B to 32B parameters and two mixtures of 128 experts: norms on query and key heads.

Command    llm-jax train --config=qwen3:8b:h100x64 --config.data.path='train_*.bin'
           llm-jax train --config=qwen3:30b_a3b:v5p-128 --config.data.path='train_*.bin'   (3.3B parameters a token)
Data       token files with Qwen's vocabulary (151,936 rows), held-out ones as data.validation_path
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   MMLU 76.9 (8B base, 5-shot) was published, on data and with a recipe that were not; the recipe is LLaMA 2's
Source     Qwen team 2025, arXiv 2505.09388, tables 1 and 2; config.json of Qwen3-0.6B to -235B-A22B
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

COLUMNS = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "tie_embeddings")
SIZES = {
    "0b6": (28, 1_024, 16, 8, 3_072, True),
    "1b7": (28, 2_048, 16, 8, 6_144, True),
    "4b": (36, 2_560, 32, 8, 9_728, True),
    "8b": (36, 4_096, 32, 8, 12_288, False),
    "14b": (40, 5_120, 40, 8, 17_408, False),
    "32b": (64, 5_120, 64, 8, 25_600, False),
    "30b_a3b": (48, 2_048, 32, 4, 768, False),  # mlp_dim: of each expert
    "235b_a22b": (94, 4_096, 64, 4, 1_536, False),
}
EXPERTS = dict(num_experts=128, top_k=8, renormalize=True, balance_loss=0.001)  # router_aux_loss_coef of config.json


def get_config(arg: str = "8b") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"qwen3:{size} is not one of {', '.join(SIZES)}"
    model = dict(zip(COLUMNS, SIZES[size], strict=True))
    model |= dict(vocab_size=151_936, head_dim=128, qk_norm="head", max_length=40_960)
    model |= dict(rope=dict(base=1_000_000.0), norm_eps=1e-6)
    if "_a" in size:
        model["moe"] = EXPERTS
    return on_token_files(f"qwen3_{size}", machine, model, length=4_096, tokens=36_000_000_000_000, learning_rate=3e-4)
