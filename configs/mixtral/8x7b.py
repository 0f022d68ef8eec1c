"""Mixtral 8x7B: 32 layers of 4,096, 8 experts of 14,336 (2 a token), 32 heads, 8 for keys; 46,702,792,704 parameters.

Command    llm-jax train --config=mixtral/8x7b:h100x64 --config.data.path='train_*.bin'
Data       token files with Mistral's vocabulary (32,000), held-out ones as data.validation_path
Hardware   h100x64, v5p-128 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      none were published: tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 70.6 (5-shot) was published, on data and with a recipe that were not; the recipe here is ours
Source     Jiang et al. 2024, arXiv 2401.04088, tables 1 and 2; config.json of Mixtral-8x7B-v0.1
"""

from ml_collections import ConfigDict

from configs.mixtral.common import mixtral


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return mixtral(
        "8x7b", machine, layers=32, width=4_096, mlp=14_336, heads=32, max_length=32_768, balance_loss=0.02,
        learning_rate=3e-4,
    )  # fmt: skip
