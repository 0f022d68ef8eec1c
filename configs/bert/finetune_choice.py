"""Fine-tuning a pre-trained encoder to choose among several endings.

Command    llm-jax train --config=bert/finetune_choice --config.init_from=hf:PATH --config.data.path=train.csv
Data       SWAG's columns: startphrase, ending0 to ending3, and label, which counts from 0
Hardware   one GPU or TPU chip, about an hour
Expected   SWAG with bert-base-uncased: accuracy 81.6 on the development set (Devlin et al. 2018, table 4)
"""

from ml_collections import ConfigDict

from configs.bert.finetune import finetune


def get_config() -> ConfigDict:
    return finetune(
        "bert_choice",
        "choice",
        num_train_epochs=3,
        learning_rate=2e-5,
        warmup_steps=500,
        metric_for_best_model="accuracy",
        path="train.csv",
        validation_fraction=0.05,
        columns=dict(text="startphrase", choices=("ending0", "ending1", "ending2", "ending3")),
        buckets=("64", "128"),
    )
