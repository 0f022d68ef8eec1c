"""Fine-tuning sentence embeddings: texts that belong together come to lie together.

Command    llm-jax train --config=bert/finetune_similarity --config.init_from=hf:PATH --config.data.path=pairs.jsonl
           llm-jax predict --workdir=runs/bert_similarity --input=texts.jsonl --embeddings
Data       {"text": ..., "pair": ...}, and with data.columns.negative a third text that is unlike. Every text of the
           batch is told from the pairs of all others, over all devices: a larger batch is a harder and better task.
Hardware   one GPU or TPU chip, minutes
Expected   all-MiniLM-L6-v2 was made so, from 1.17 billion pairs; its card has the figures
Source     Reimers and Gurevych 2019, arXiv 1908.10084; Gao et al. 2021, arXiv 2104.08821, equation 5
"""

from ml_collections import ConfigDict

from configs.bert.finetune import finetune


def get_config() -> ConfigDict:
    return finetune(
        "bert_similarity",
        "similarity",
        num_train_epochs=1,
        per_device_train_batch_size=64,
        learning_rate=2e-5,
        warmup_steps=100,
        metric_for_best_model="accuracy",
        path="pairs.jsonl",
        validation_fraction=0.05,
        columns=dict(pair="pair"),
        buckets=("32", "64", "128"),
    )
