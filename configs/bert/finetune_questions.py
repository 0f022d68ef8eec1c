"""Fine-tuning a pre-trained encoder to find the answer to a question in a text, or to say that it is not there.

Command    llm-jax train --config=bert/finetune_questions --config.init_from=hf:PATH --config.data.path=train.jsonl
Data       one question a record: {"question": ..., "context": ..., "answers": {"text": [...], "answer_start": [...]}};
           empty lists where the context holds no answer (SQuAD 2.0)
Hardware   one GPU or TPU chip, about an hour
Expected   SQuAD 1.1 with bert-base-uncased: F1 88.4 on the development set (google-research/bert, README)
"""

from ml_collections import ConfigDict

from configs.bert.finetune import finetune


def get_config() -> ConfigDict:
    return finetune(
        "bert_questions",
        "questions",
        num_train_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=3e-5,
        warmup_steps=500,
        max_length=384,
        metric_for_best_model="f1",
        path="train.jsonl",
        validation_fraction=0.05,
        columns=dict(text="question", pair="context", label="answers"),
        stride=128,
        answer_length=30,
    )
