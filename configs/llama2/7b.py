"""LLaMA-2 7B: 32 layers of 4,096, MLPs of 11,008, 32 heads of 128, as many key-value heads; 6,738,415,616 parameters.

Command    llm-jax train --config=llama2/7b:h100x64 --config.data.path='train_*.bin'
Data       token files with LLaMA-2's vocabulary (32,000), held-out ones as data.validation_path; 2T tokens in the paper
Hardware   h100x64, v5p-128 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      184,320 A100 hours were published; others: 2T tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 45.3 (5-shot) in the paper, on data that were not published
Source     Touvron et al. 2023, arXiv 2307.09288, tables 1, 2 and 3; MLP width from the released params.json
"""

from ml_collections import ConfigDict

from configs.llama2.common import llama2


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return llama2("7b", machine, layers=32, width=4_096, mlp=11_008, heads=32, kv_heads=32, learning_rate=3e-4)
