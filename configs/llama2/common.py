"""What all LLaMA-2 sizes share (Touvron et al. 2023, arXiv 2307.09288, section 2.2 and table 1)."""

from ml_collections import ConfigDict

from configs.machines import fit, model_size

CONTEXT = 4_096
ROWS = 1_024  # "4M tokens" a step


def llama2(
    name: str, machine: str, *, layers: int, width: int, mlp: int, heads: int, kv_heads: int, learning_rate: float
) -> ConfigDict:
    """The config of one size on a machine of configs/machines.py; "": all devices shard the parameters."""
    size = model_size(layers=layers, width=width, mlp=mlp, heads=heads, kv_heads=kv_heads, vocab=32_000, length=CONTEXT)
    cfg = ConfigDict(
        dict(
            name=f"llama2_{name}",
            model=dict(
                vocab_size=32_000,
                num_layers=layers,
                embed_dim=width,
                num_heads=heads,
                num_kv_heads=kv_heads,
                mlp_dim=mlp,
                max_length=CONTEXT,
                positions="rotary",  # base 10,000
                norm="rmsnorm",
                norm_eps=1e-5,
                activation="swiglu",
                tie_embeddings=False,
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
            train=dict(tokens=2_000_000_000_000, global_batch_size=ROWS, loss_chunk=512),
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
