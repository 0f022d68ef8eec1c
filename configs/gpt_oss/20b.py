"""GPT-OSS 20b: 24 layers of 2,880, 32 experts of 2,880 (4 a token), 64 heads, 8 for keys.

20,914,757,184 parameters, of which a token meets 3.6 billion. Every other layer has a window of 128 tokens.

Command    llm-jax train --config=gpt_oss/20b:h100x64 --config.data.path='train_*.bin'
Data       token files with the vocabulary o200k_harmony (201,088 rows), held-out ones as data.validation_path
Hardware   h100x64, v5p-128 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      none were published for this recipe: tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 85.3 (high reasoning effort) after post-training, by a recipe that was not published; this one is ours
Source     OpenAI 2025, arXiv 2508.10925, section 2 and table 3; config.json of gpt-oss-20b
"""

from ml_collections import ConfigDict

from configs.gpt_oss.common import gpt_oss


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return gpt_oss("20b", machine, layers=24, experts=32)
