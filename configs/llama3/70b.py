"""LLaMA-3.1 70B: 80 layers of 8,192, MLPs of 28,672, 64 heads of 128, 8 for keys; 70,553,706,496 parameters.

Command    llm-jax train --config=llama3/70b:h100x512 --config.data.path='train_*.bin'
Data       Megatron token files (32 bits) with LLaMA-3's vocabulary (128,256), held-out ones as data.validation_path;
           15.6T tokens in the paper
Batch      8M tokens a step are ours: the paper gives no batch for this size
Hardware   h100x512, v5p-1024 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      7.0M H100 hours were published; others: tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 79.3 (base, 5-shot) in the model card, on data that were not published
Source     Grattafiori et al. 2024, arXiv 2407.21783, table 3; the LLaMA 3.1 model card
"""

from ml_collections import ConfigDict

from configs.llama3.common import llama3


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return llama3("70b", machine, layers=80, width=8_192, mlp=28_672, heads=64, rows=1_024, learning_rate=1.5e-4)
