"""What both GPT-OSS sizes share (OpenAI 2025, arXiv 2508.10925, section 2, and the released config.json files).

Published are the models. How they were trained is not: batch, learning rate, length and tokens are ours.
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files


def gpt_oss(name: str, machine: str, *, layers: int, experts: int) -> ConfigDict:
    """The config of one size on a machine of configs/machines.py; "": all devices shard the parameters."""
    model = dict(
        vocab_size=201_088,
        num_layers=layers,
        embed_dim=2_880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=2_880,  # of each expert
        max_length=131_072,
        rope=dict(base=150_000.0, scaling="yarn", factor=32.0, original_length=4_096, truncate=False),
        norm_eps=1e-5,
        activation="clamped_swiglu",
        bias="all",
        sliding_window=128,
        layer_pattern=("window", "full"),
        attention_sinks=True,
        moe=dict(num_experts=experts, top_k=4, renormalize=True, router_bias=True, balance_loss=0.001),
    )
    tokens = 10_000_000_000_000  # "trillions" (section 2.4)
    return on_token_files(f"gpt_oss_{name}", machine, model, length=4_096, tokens=tokens, learning_rate=3e-4)
