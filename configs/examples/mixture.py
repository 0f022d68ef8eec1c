"""Several local corpora by share of tokens: an encyclopedia, books and code, each a folder or files of text or JSONL.

Command    llm-jax train --config=examples/mixture --config.data.mixture.books.path=/data/books
Data       your own; --config.data.mixture.NAME.path sets one, a new NAME adds one
Hardware   one GPU or a few CPU cores, for a first look
Expected   depends on the corpora; `llm-jax data inspect --config=examples/mixture` shows what is trained on
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="mixture",
            model=dict(num_layers=8, num_heads=8, embed_dim=512, mlp_dim=1_536, max_length=1024),
            data=dict(
                mixture=dict(
                    encyclopedia=dict(path="corpora/encyclopedia", weight=0.5),
                    books=dict(path="corpora/books", weight=0.3),
                    code=dict(path="corpora/code", weight=0.2),
                ),
                tokenizer="bpe",
                tokenizer_vocab_size=16_384,
                sequence_length=1024,
            ),
            train=dict(tokens=1_000_000_000, global_batch_size=128, accumulation=4),
            optim=dict(learning_rate=1e-3, warmup_ratio=0.02),
            precision=dict(compute="bfloat16"),
        )
    )
