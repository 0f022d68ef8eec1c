"""A tiny run with everything on that could make a restart differ: packing, mixture, dropout, accumulation, average.

Command    llm-jax train --config=smoke/everything
Hardware   one CPU core, some seconds
Expected   killed at any moment and started again, the same losses bit for bit as if it had never stopped
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="smoke_everything",
            model=dict(
                num_layers=2,
                embed_dim=32,
                num_heads=4,
                num_kv_heads=2,
                max_length=64,
                qk_norm="head",
                dropout=dict(embedding=0.1, attention=0.1, attention_output=0.1, mlp_output=0.1),
            ),
            data=dict(
                mixture=dict(
                    first=dict(path="synthetic", weight=0.7),
                    second=dict(path="synthetic", format="synthetic", separator="\n", weight=0.3),
                ),
                mixture_temperature=2.0,
                tokenizer="bpe",
                tokenizer_vocab_size=300,
                sequence_length=64,
                packing="best_fit",
            ),
            train=dict(steps=20, global_batch_size=16, accumulation=2, z_loss=1e-4, label_smoothing=0.1, ema_decay=0.9),
            optim=dict(name="muon", learning_rate=3e-3, schedule="wsd", warmup_steps=4, cooldown_ratio=0.5),
            checkpoint=dict(every=5),
            eval=dict(every=10, batches=2),
            log=dict(every=1),
            generate=dict(max_tokens=16),
        )
    )
