"""Mixtral 8x7B on 128 chips of v5p, 512 rows of 4,096 a step.

Command    llm-jax train --config=mixtral/8x7b_v5p_128 --config.data.path='train_*.bin'
Data       as configs/mixtral/8x7b.py
Hardware   one slice v5p:4x4x8 (v5p-256); 87 of the 95.7 GiB of a chip's memory are taken
Hours      6.22 s a step predicted
Expected   as configs/mixtral/8x7b.py
Source     llm-jax plan --topology=v5p:4x4x8 --search; full remat takes 7.55 s by the same model (launch/planning.md)
"""

from ml_collections import ConfigDict

from configs.mixtral.common import mixtral


def get_config() -> ConfigDict:
    cfg = mixtral(
        "8x7b", "", layers=32, width=4_096, mlp=14_336, heads=32, max_length=32_768, balance_loss=0.02,
        learning_rate=3e-4,
    )  # fmt: skip
    cfg.name = "mixtral_8x7b_v5p_128"
    cfg.train.global_batch_size = 512
    cfg.train.accumulation = 1
    cfg.train.loss_chunk = 0
    cfg.mesh = dict(data=1, fsdp=128)
    cfg.model.remat = "names"
    cfg.model.remat_save = ("layer_input", "attention", "attention_output", "mlp_up", "mlp_gate", "mlp_output")
    return cfg
