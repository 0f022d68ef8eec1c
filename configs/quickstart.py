"""A small GPT on the source of Python's own standard library: the first run, with nothing to download.

Command    llm-jax train --config=quickstart
Data       the interpreter's standard library, about 9 MB of Python; validation on modules left out of training
Hardware   two CPU cores, about two minutes
Expected   about 1.70 bits per byte on the held-out modules, where `xz -9` reaches 1.71
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="quickstart",
            model=dict(
                num_layers=4,
                num_heads=4,
                embed_dim=128,
                max_length=256,
                qk_norm="head",  # keeps the high learning rate stable
                activation="gelu",
                scan_layers=False,  # a small model runs faster with every layer compiled on its own
            ),
            data=dict(
                path="stdlib",
                tokenizer="bpe",
                tokenizer_vocab_size=2_048,  # more ids would cost more in the head than they save in tokens
                sequence_length=256,
            ),
            train=dict(steps=500, global_batch_size=8),  # 2,048 tokens a step: many small steps suit so short a run
            optim=dict(
                name="muon",
                learning_rate=1e-2,
                schedule="wsd",
                warmup_steps=20,
                cooldown_ratio=0.7,
                final_ratio=0.0,
            ),
            eval=dict(every=250),
            checkpoint=dict(every=250),
            generate=dict(prompt="def ", max_tokens=120),
        )
    )
