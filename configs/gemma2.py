"""Gemma 2, 2B, 9B and 27B parameters: a window in every other layer, norms round each part, capped scores.

Command    llm-jax train --config=gemma2:2b:h100x64 --config.data.path='train_*.bin'
Data       token files with Gemma's vocabulary (256,000 rows), held-out ones as data.validation_path; 2T, 8T, 13T tokens
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   MMLU 71.3 (9B) and 75.2 (27B, 5-shot) were published, on data that were not; 2B and 9B learned from a larger
           model's probabilities, here from the text alone, and the recipe is LLaMA 2's
Source     Gemma team 2024, arXiv 2408.00118, table 1; config.json of gemma-2-2b, -9b and -27b
"""

from ml_collections import ConfigDict

from configs.gemma import COLUMNS, EVERY_GEMMA
from configs.pretraining import on_token_files

SIZES = {
    "2b": ((26, 2_304, 8, 4, 9_216), {}, 2_000_000_000_000),
    "9b": ((42, 3_584, 16, 8, 14_336), {}, 8_000_000_000_000),
    # scores times 1 / sqrt(width / heads), not 1 / sqrt(head)
    "27b": ((46, 4_608, 32, 16, 36_864), dict(head_dim=128, attention_scale=144**-0.5), 13_000_000_000_000),
}


def get_config(arg: str = "2b") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"gemma2:{size} is not one of {', '.join(SIZES)}"
    shape, own, tokens = SIZES[size]
    model = dict(zip(COLUMNS, shape, strict=True)) | EVERY_GEMMA | own
    model |= dict(vocab_size=256_000, max_length=8_192, norm_placement="sandwich")
    model |= dict(sliding_window=4_096, layer_pattern=("window", "full"), attention_softcap=50.0, logits_softcap=30.0)
    return on_token_files(f"gemma2_{size}", machine, model, length=8_192, tokens=tokens, learning_rate=3e-4)
