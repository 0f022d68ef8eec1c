"""Fine-tuning a pre-trained encoder to label words: names, parts of speech.

Command    llm-jax train --config=bert/finetune_tokens --config.init_from=hf:PATH --config.data.path=train.jsonl
Data       jsonl or parquet with lists: {"words": ["Ada", "lives", "in", "Rome"], "tags": ["B-PER", "O", "O", "B-LOC"]}.
           A word's first piece carries its label, and no loss is taken at the others. Entities are read from B-, I-, E-
           and S- as CoNLL's script does.
Hardware   one GPU or TPU chip, minutes
Expected   CoNLL-2003 with bert-base-cased: entity F1 on the test set 92.4 (Devlin et al. 2018, table 7)
"""

from ml_collections import ConfigDict

from configs.bert.finetune import finetune


def get_config() -> ConfigDict:
    return finetune(
        "bert_tokens",
        "tokens",
        num_train_epochs=3,
        warmup_steps=100,
        metric_for_best_model="f1",
        path="train.jsonl",
        validation_fraction=0.1,
        columns=dict(text="words", label="tags"),
        buckets=("32", "64", "128"),
    )
