"""One layer of 16 numbers on the bytes of a synthetic text: what the tests beside this file train."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="tiny",
            model=dict(num_layers=1, embed_dim=16, num_heads=2, max_length=32),
            data=dict(path="synthetic", tokenizer="byte", sequence_length=32),
            train=dict(steps=12, global_batch_size=8),
            optim=dict(learning_rate=1e-2, schedule="constant"),
            eval=dict(batches=1),
            log=dict(every=1, trackers=()),
            generate=dict(max_tokens=0),
        )
    )
