"""DeepSeek-V3: 61 layers of 7,168, latent attention, 256 experts of 2,048 (8 a token) and one for all tokens.

671,026,419,200 parameters, of which a token meets 37 billion. Experts are chosen by sigmoid scores, within 4 of 8
groups, and kept busy by a bias that moves without a loss.

Command    llm-jax train --config=deepseek/v3:h100x2048 --config.data.path='train_*.bin'
Data       token files with DeepSeek's vocabulary (129,280 rows), held-out ones as data.validation_path
Hardware   h100x2048 (as theirs), v5p-4096 or any other of configs/machines.py; it sets the mesh (launch/meshes.md)
Hours      2.664 million of H800 GPUs for 14.8 trillion tokens, with products in FP8 (table 1)
Expected   MMLU 87.1 (5-shot) was published, on data that were not
Source     DeepSeek-AI 2024, arXiv 2412.19437, sections 2 and 4.2; config.json of DeepSeek-V3. Theirs also predicted
           a second token, grew its batch, and let the rate stand until 10 trillion tokens; it is the model before its
           context was stretched (no YaRN, 4,096 tokens)
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files


def get_config(machine: str = "") -> ConfigDict:
    """`machine`: as in configs/machines.py; "" for all devices there are, sharding the parameters."""
    model = dict(
        vocab_size=129_280,
        num_layers=61,
        embed_dim=7_168,
        num_heads=128,
        head_dim=128,
        mlp_dim=18_432,  # of the first three layers
        max_length=4_096,
        norm_eps=1e-6,
        latent=dict(kv_rank=512, query_rank=1_536, rope_dim=64, value_dim=128),
        moe=dict(
            num_experts=256,
            top_k=8,
            expert_dim=2_048,
            shared_dim=2_048,
            dense_layers=3,
            scores="sigmoid",
            groups=8,
            top_groups=4,
            renormalize=True,
            scale=2.5,
            balance_bias=True,
            balance_rate=0.001,
            balance_loss=0.0001,
        ),
        init_std=0.006,
        residual_init_scale=False,
    )
    return on_token_files(
        "deepseek_v3", machine, model, length=4_096, rows=15_360, tokens=14_800_000_000_000, learning_rate=2.2e-4,
        optim=dict(eps=1e-8),
    )  # fmt: skip
