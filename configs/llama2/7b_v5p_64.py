"""LLaMA-2 7B on 64 chips of v5p, 256 rows of 2,048 a step: first of `llm-jax plan --search`.

Command    llm-jax train --config=llama2/7b_v5p_64 --config.data.path='train_*.bin'
Data       as configs/llama2/7b.py
Hardware   one slice v5p:4x4x4 (v5p-128); 26 GiB of a chip's memory are taken
Hours      1.03 s a step predicted: 46 days for the paper's 2T tokens
Expected   as configs/llama2/7b.py
Source     llm-jax plan --search --topology=v5p:4x4x4; launch/planning.md has what others take by the same model
"""

from ml_collections import ConfigDict

from configs.llama2.common import llama2


def get_config() -> ConfigDict:
    cfg = llama2("7b", "", layers=32, width=4_096, mlp=11_008, heads=32, kv_heads=32, learning_rate=3e-4)
    cfg.name = "llama2_7b_v5p_64"
    cfg.data.sequence_length = 2_048
    cfg.train.global_batch_size = 256
    cfg.train.loss_chunk = 0  # 1 GB of logits, and no second time for them
    cfg.mesh = dict(data=1, fsdp=64)
    cfg.model.remat = "names"
    cfg.model.remat_save = (
        "layer_input", "query", "key", "value", "attention", "attention_output", "mlp_up", "mlp_gate"
    )  # fmt: skip
    return cfg
