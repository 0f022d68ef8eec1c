"""LLaMA-2 70B: 80 layers of 8,192, MLPs of 28,672, 64 heads of 128, 8 key-value heads; 68,976,648,192 parameters.

Command    llm-jax train --config=llama2/70b:h100x512 --config.data.path='train_*.bin'
Data       token files with LLaMA-2's vocabulary (32,000), held-out ones as data.validation_path; 2T tokens in the paper
Hardware   h100x512, v5p-1024 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      1,720,320 A100 hours were published; others: 2T tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 68.9 (5-shot) in the paper, on data that were not published
Source     Touvron et al. 2023, arXiv 2307.09288, tables 1, 2 and 3; MLP width from the released params.json
"""

from ml_collections import ConfigDict

from configs.llama2.common import llama2


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return llama2("70b", machine, layers=80, width=8_192, mlp=28_672, heads=64, kv_heads=8, learning_rate=1.5e-4)
