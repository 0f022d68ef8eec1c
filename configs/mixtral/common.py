"""What both Mixtral sizes share (Jiang et al. 2024, arXiv 2401.04088, table 1, and the released config.json files).

Published are the models. How they were trained is not: batch, learning rate, length and tokens are ours, after LLaMA-2.
"""

from ml_collections import ConfigDict

from configs.machines import fit, model_size

CONTEXT = 4_096  # ours; the released models go to 32,768 and 65,536
ROWS = 1_024


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
    size = model_size(
        layers=layers, width=width, mlp=mlp, heads=heads, kv_heads=8, vocab=32_000, length=CONTEXT, experts=8, top_k=2
    )
    cfg = ConfigDict(
        dict(
            name=f"mixtral_{name}",
            model=dict(
                vocab_size=32_000,
                num_layers=layers,
                embed_dim=width,
                num_heads=heads,
                num_kv_heads=8,
                mlp_dim=mlp,  # of each expert
                max_length=max_length,
                positions="rotary",
                rope=dict(base=1_000_000.0),
                norm="rmsnorm",
                norm_eps=1e-5,
                activation="swiglu",
                tie_embeddings=False,
                moe=dict(
                    num_experts=8,
                    top_k=2,
                    renormalize=True,  # softmax over the two chosen (section 2.1)
                    balance_loss=balance_loss,  # router_aux_loss_coef of config.json
                ),
                remat="full",
            ),
            data=dict(
                path="train.bin",
                validation_path="val.bin",
                tokenizer="none",
                eos="none",  # the token files have theirs
                sequence_length=CONTEXT,
                mask_documents=False,  # the paper names no mask
            ),
            train=dict(tokens=1_000_000_000_000, global_batch_size=ROWS, loss_chunk=512),
            optim=dict(
                learning_rate=learning_rate,
                beta1=0.9,
                beta2=0.95,
                eps=1e-5,
                weight_decay=0.1,
                clip_norm=1.0,
                warmup_steps=2_000,
                final_ratio=0.1,
            ),
            precision=dict(compute="bfloat16"),
            eval=dict(batches=20),
            generate=dict(max_tokens=0),  # token files bring no tokenizer
        )
    )
    cfg.update(fit(machine, size, ROWS))
    return cfg
