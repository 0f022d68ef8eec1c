"""LLaMA-3.1 8B: 32 layers of 4,096, MLPs of 14,336, 32 heads of 128, 8 for keys; 8,030,261,248 parameters.

Command    llm-jax train --config=llama3/8b:h100x64 --config.data.path='train_*.bin'
Data       Megatron token files (32 bits) with LLaMA-3's vocabulary (128,256), held-out ones as data.validation_path;
           15.6T tokens in the paper
Batch      8M tokens a step are ours: the paper gives no batch for this size
Hardware   h100x64, v5p-128 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      1.46M H100 hours were published; others: tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 66.7 (base, 5-shot) in the model card, on data that were not published
Source     Grattafiori et al. 2024, arXiv 2407.21783, table 3; the LLaMA 3.1 model card
"""

from ml_collections import ConfigDict

from configs.llama3.common import llama3


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return llama3("8b", machine, layers=32, width=4_096, mlp=14_336, heads=32, rows=1_024, learning_rate=3e-4)
