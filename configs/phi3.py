"""Phi-3 mini and medium, with contexts of 4,096: 3.8B and 14B parameters in the LLaMA form.

Command    llm-jax train --config=phi3:mini:h100x64 --config.data.path='train_*.bin'
Data       token files with their vocabulary (32,064 rows), held-out ones as data.validation_path
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   MMLU 68.8 (mini, 5-shot) was published, on data and with a recipe that were not; the recipe is LLaMA 2's
Source     Abdin et al. 2024, arXiv 2404.14219, section 2; config.json of Phi-3-mini-4k and -medium-4k
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

COLUMNS = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim")
SIZES = {"mini": (32, 3_072, 32, 32, 8_192), "medium": (40, 5_120, 40, 10, 17_920)}


def get_config(arg: str = "mini") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"phi3:{size} is not one of {', '.join(SIZES)}"
    model = dict(zip(COLUMNS, SIZES[size], strict=True))
    model |= dict(vocab_size=32_064, max_length=4_096, sliding_window=2_047, norm_eps=1e-5)
    return on_token_files(f"phi3_{size}", machine, model, length=4_096, tokens=3_300_000_000_000, learning_rate=3e-4)
