"""Gemma 3, the text models of 1B, 4B, 12B and 27B parameters: five layers with a window, then one that sees all.

Command    llm-jax train --config=gemma3:1b:h100x64 --config.data.path='train_*.bin'
Data       token files with Gemma 3's vocabulary (262,144), held-out ones as data.validation_path; 2T to 14T tokens
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   MMLU 59.6 (4B) and 78.6 (27B, 5-shot) were published, with images, on data that were not and from a larger
           model's probabilities; here from the text alone, and the recipe is LLaMA 2's
Source     Gemma team 2025, arXiv 2503.19786, table 1; config.json of gemma-3-1b-pt to -27b-pt
"""

from ml_collections import ConfigDict

from configs.gemma import COLUMNS, EVERY_GEMMA
from configs.pretraining import on_token_files

# The larger ones were stretched from 32,768 to 131,072 tokens, by 8; their checkpoints have 64 more rows, for images.
LONG = dict(vocab_size=262_208, sliding_window=1_024, max_length=131_072)
LONG_ROPE = dict(base=1_000_000.0, scaling="linear", factor=8.0)
SIZES = {
    "1b": (
        (26, 1_152, 4, 1, 6_912),
        dict(vocab_size=262_144, sliding_window=512, max_length=32_768, rope=dict(base=1_000_000.0)),
        2_000_000_000_000,
    ),
    "4b": ((34, 2_560, 8, 4, 10_240), LONG | dict(rope=LONG_ROPE), 4_000_000_000_000),
    "12b": ((48, 3_840, 16, 8, 15_360), LONG | dict(rope=LONG_ROPE), 12_000_000_000_000),
    # scores times 1 / sqrt(width / heads), not 1 / sqrt(head)
    "27b": (
        (62, 5_376, 32, 16, 21_504),
        LONG | dict(rope=LONG_ROPE, head_dim=128, attention_scale=168**-0.5),
        14_000_000_000_000,
    ),
}


def get_config(arg: str = "1b") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"gemma3:{size} is not one of {', '.join(SIZES)}"
    shape, own, tokens = SIZES[size]
    model = dict(zip(COLUMNS, shape, strict=True)) | EVERY_GEMMA | own
    model |= dict(norm_placement="sandwich", qk_norm="head", window_rope_base=10_000.0)
    model |= dict(layer_pattern=("window",) * 5 + ("full",))
    return on_token_files(f"gemma3_{size}", machine, model, length=8_192, tokens=tokens, learning_rate=3e-4)
