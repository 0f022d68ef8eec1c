"""Gemma, 2B and 7B parameters: heads of 256, GELU gates, norms times 1 + w, a tied table of 256,000 rows.

Command    llm-jax train --config=gemma:2b:h100x64 --config.data.path='train_*.bin'
Data       token files with Gemma's vocabulary (256,000 rows), held-out ones as data.validation_path; 3T and 6T tokens
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   MMLU 42.3 and 64.3 (5-shot) were published, on data and with a recipe that were not; the recipe is LLaMA 2's
Source     Gemma team 2024, arXiv 2403.08295, table 1; config.json of gemma-2b and gemma-7b
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

COLUMNS = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim")
SIZES = {
    "2b": ((18, 2_048, 8, 1, 16_384), 3_000_000_000_000),
    "7b": ((28, 3_072, 16, 16, 24_576), 6_000_000_000_000),
}
EVERY_GEMMA = dict(
    head_dim=256, activation="geglu", norm_scale="zero", norm_eps=1e-6, embedding_scale=True, tie_embeddings=True
)  # fmt: skip


def get_config(arg: str = "2b") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"gemma:{size} is not one of {', '.join(SIZES)}"
    shape, tokens = SIZES[size]
    model = dict(zip(COLUMNS, shape, strict=True)) | EVERY_GEMMA | dict(vocab_size=256_000, max_length=8_192)
    return on_token_files(f"gemma_{size}", machine, model, length=8_192, tokens=tokens, learning_rate=3e-4)
