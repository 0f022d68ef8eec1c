"""What both Mixtral sizes share (Jiang et al. 2024, arXiv 2401.04088, table 1, and the released config.json files).

Published are the models. How they were trained is not: batch, learning rate, length and tokens are ours, after LLaMA-2.
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

CONTEXT = 4_096  # ours; the released models go to 32,768 and 65,536


def mixtral(
    name: str,
    machine: str,
    *,
    layers: int,
    width: int,
    mlp: int,
    heads: int,
    max_length: int,
    balance_loss: float,
    learning_rate: float,
) -> ConfigDict:
    """The config of one size on a machine of configs/machines.py; "": all devices shard the parameters."""
    model = dict(
        vocab_size=32_000,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=8,
        mlp_dim=mlp,  # of each expert
        max_length=max_length,
        rope=dict(base=1_000_000.0),
        norm_eps=1e-5,
        moe=dict(
            num_experts=8,
            top_k=2,
            renormalize=True,  # softmax over the two chosen (section 2.1)
            balance_loss=balance_loss,  # router_aux_loss_coef of config.json
        ),
    )
    tokens = 1_000_000_000_000
    return on_token_files(f"mixtral_{name}", machine, model, length=CONTEXT, tokens=tokens, learning_rate=learning_rate)
