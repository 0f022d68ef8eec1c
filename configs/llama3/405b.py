"""LLaMA-3.1 405B: 126 layers of 16,384, MLPs of 53,248, 128 heads of 128, 8 for keys; 405,853,388,800 parameters.

Command    llm-jax train --config=llama3/405b:h100x512 --config.data.path='train_*.bin'
Data       Megatron token files (32 bits) with LLaMA-3's vocabulary (128,256), held-out ones as data.validation_path;
           15.6T tokens in the paper
Batch      16M tokens a step, the paper's last and longest stage
Hardware   h100x512, v5p-1024 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      30.84M H100 hours were published; others: tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 85.2 (base, 5-shot) in the model card, on data that were not published
Source     Grattafiori et al. 2024, arXiv 2407.21783, table 3; the LLaMA 3.1 model card
"""

from ml_collections import ConfigDict

from configs.llama3.common import llama3


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return llama3("405b", machine, layers=126, width=16_384, mlp=53_248, heads=128, rows=2_048, learning_rate=8e-5)
