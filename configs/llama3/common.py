"""What all LLaMA-3.1 sizes share (Grattafiori et al. 2024, arXiv 2407.21783, table 3 and section 3.4).

Positions are those of 3.1: rotary, base 500,000, scaled by 8 for contexts of 131,072, as in the released checkpoints.
For LLaMA 3 (April 2024, contexts of 8,192) add
--config.model.rope.scaling=none --config.model.rope.factor=1 --config.model.max_length=8192.
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

CONTEXT = 8_192  # of most of the pre-training; the released models go to 131,072


def llama3(
    name: str, machine: str, *, layers: int, width: int, mlp: int, heads: int, rows: int, learning_rate: float
) -> ConfigDict:
    """The config of one size on a machine of configs/machines.py; "": all devices shard the parameters.

    `rows` of 8,192 tokens a step: the paper gives 4M, 8M and then 16M tokens for 405B, and no figure for the others.
    """
    model = dict(
        vocab_size=128_256,  # 128,000 and 256 special ones
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=8,
        mlp_dim=mlp,
        max_length=131_072,
        rope=dict(
            base=500_000.0,
            scaling="llama3",
            factor=8.0,
            original_length=8_192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        norm_eps=1e-5,
    )
    return on_token_files(
        f"llama3_{name}",
        machine,
        model,
        length=CONTEXT,
        rows=rows,
        tokens=15_600_000_000_000,
        learning_rate=learning_rate,
        mask_documents=True,  # "an attention mask that prevents self-attention between different documents"
        # 8e-5 to 8e-7, over the whole run (the paper's 1.2M steps are of growing batches)
        optim=dict(eps=1e-8, warmup_steps=8_000, final_ratio=0.01),
    )
