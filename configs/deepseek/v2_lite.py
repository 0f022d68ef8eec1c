"""DeepSeek-V2-Lite: 27 layers of 2,048, latent attention, 64 experts of 1,408 (6 a token) and 2 for all tokens.

15,706,484,224 parameters, of which a token meets 2.4 billion (the embedding not counted).

Command    llm-jax train --config=deepseek/v2_lite:h100x64 --config.data.path='train_*.bin'
Data       token files with DeepSeek's vocabulary (102,400 rows), held-out ones as data.validation_path
Hardware   h100x64, v5p-128 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      none were published: tokens x FLOPs a token (--dry_run) / (devices x peak x MFU)
Expected   MMLU 58.3 (5-shot) was published, on data that were not
Source     DeepSeek-AI 2024, arXiv 2405.04434, appendix B; config.json of DeepSeek-V2-Lite. The rate fell in two steps
           there, by a cosine here; it is the model before its context was stretched (no YaRN, 4,096 tokens)
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    model = dict(
        vocab_size=102_400,
        num_layers=27,
        embed_dim=2_048,
        num_heads=16,
        head_dim=128,
        mlp_dim=10_944,  # of the first layer
        max_length=4_096,
        norm_eps=1e-6,
        latent=dict(kv_rank=512, rope_dim=64, value_dim=128),
        moe=dict(
            num_experts=64,
            top_k=6,
            expert_dim=1_408,
            shared_dim=2 * 1_408,
            dense_layers=1,
            renormalize=False,
            balance_loss=0.001,
        ),
        init_std=0.006,
        residual_init_scale=False,
    )
    return on_token_files(
        "deepseek_v2_lite", machine, model, length=4_096, rows=4_608, tokens=5_700_000_000_000, learning_rate=4.2e-4,
        optim=dict(eps=1e-8),
    )  # fmt: skip
