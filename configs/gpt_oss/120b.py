"""GPT-OSS 120b: 36 layers of 2,880, 128 experts of 2,880 (4 a token), 64 heads, 8 for keys.

116,829,156,672 parameters, of which a token meets 5.1 billion. Every other layer has a window of 128 tokens.

Command    llm-jax train --config=gpt_oss/120b:h100x512 --config.data.path='train_*.bin'
Data       token files with the vocabulary o200k_harmony (201,088 rows), held-out ones as data.validation_path
Hardware   h100x512, v5p-1024 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      none were published for this recipe: tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 90.0 (high reasoning effort) after post-training, by a recipe that was not published; this one is ours
Source     OpenAI 2025, arXiv 2508.10925, section 2 and table 3; config.json of gpt-oss-120b
"""

from ml_collections import ConfigDict

from configs.gpt_oss.common import gpt_oss


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return gpt_oss("120b", machine, layers=36, experts=128)
