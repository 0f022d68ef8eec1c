"""A small GPT on the text of Python's own standard library: the first run, with no download.

    llm-jax train --config=quickstart --workdir=runs/quickstart

Hardware: any laptop (2 CPU cores). Time and expected validation loss: see the README.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.name = "quickstart"
    config.model = dict(num_layers=4, embed_dim=256, num_heads=4, max_length=256)
    config.data = dict(path="stdlib", tokenizer="bpe", tokenizer_vocab_size=4096, sequence_length=256)
    config.train = dict(steps=300, global_batch_size=16)
    config.optim = dict(name="adamw", learning_rate=1e-3, warmup_steps=30)
    config.eval = dict(every=100, batches=8)
    config.checkpoint = dict(every=100)
    config.generate = dict(prompt="def ", max_tokens=64)
    return config
