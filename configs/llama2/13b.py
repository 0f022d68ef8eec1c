"""LLaMA-2 13B: 40 layers of 5,120, MLPs of 13,824, 40 heads of 128, as many key-value heads; 13,015,864,320 parameters.

Command    llm-jax train --config=llama2/13b:h100x128 --config.data.path='train_*.bin'
Data       token files with LLaMA-2's vocabulary (32,000), held-out ones as data.validation_path; 2T tokens in the paper
Hardware   h100x128, v5p-256 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      368,640 A100 hours were published; others: 2T tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 54.8 (5-shot) in the paper, on data that were not published
Source     Touvron et al. 2023, arXiv 2307.09288, tables 1, 2 and 3; MLP width from the released params.json
"""

from ml_collections import ConfigDict

from configs.llama2.common import llama2


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return llama2("13b", machine, layers=40, width=5_120, mlp=13_824, heads=40, kv_heads=40, learning_rate=3e-4)
