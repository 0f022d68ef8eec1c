"""Mixtral 8x22B: 56 layers of 6,144, 8 experts of 16,384 (2 a token), 48 heads, 8 for keys; 140,620,634,112 parameters.

Command    llm-jax train --config=mixtral/8x22b:h100x256 --config.data.path='train_*.bin'
Data       token files with Mistral's vocabulary (32,000), held-out ones as data.validation_path
Hardware   h100x256, v5p-512 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      none were published: tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 77.8 (5-shot) of the released weights, on data and with a recipe not published; the recipe here is ours
Source     config.json of Mixtral-8x22B-v0.1 (vocabulary 32,000; later ones have 32,768); MMLU: Open LLM Leaderboard
"""

from ml_collections import ConfigDict

from configs.mixtral.common import mixtral


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    return mixtral(
        "8x22b", machine, layers=56, width=6_144, mlp=16_384, heads=48, max_length=65_536, balance_loss=0.001,
        learning_rate=1.5e-4,
    )  # fmt: skip
