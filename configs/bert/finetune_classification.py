"""Fine-tuning a pre-trained encoder to label texts or pairs of texts.

Command    llm-jax train --config=bert/finetune_classification --config.init_from=hf:PATH
           llm-jax predict --workdir=runs/bert_classification --input=new.jsonl --output=labels.jsonl
Data       without more, the docstrings of Python's standard library of 40 characters and more, labelled with the area
           of their module in the library's reference (concurrency, data, development, files, interface, network);
           whole top-level modules are held out, about a fifth of them. Your own, a jsonl, csv, tsv or parquet file:
             --config.data.path=train.csv --config.data.validation_path=dev.csv
             --config.data.columns.text=sentence1 --config.data.columns.pair=sentence2 --config.data.columns.label=label
Hardware   one GPU or TPU chip, minutes; two CPU cores: under an hour for a model of 22 million parameters
Expected   on the docstrings the most frequent area alone has an accuracy of about 0.25; `python -m benchmarks.bert`
           prints what all-MiniLM-L6-v2 reaches, beside transformers' Trainer on the same batches

The terms that people know, and the keys they become:

    num_train_epochs=3                   train.epochs
    per_device_train_batch_size=16       train.global_batch_size = 16 x num_devices
    per_device_eval_batch_size=64        eval.batch_size = 64 x num_devices
    learning_rate=5e-5                   optim.learning_rate; linear to 0, as optim.schedule and optim.final_ratio say
    warmup_steps=500                     optim.warmup_steps; a run too short for it is refused
    weight_decay=0.01                    optim.weight_decay; not on norms and biases
    max_grad_norm=1.0                    optim.clip_norm
    adam_beta1, adam_beta2, adam_epsilon optim.beta1, optim.beta2, optim.eps
    gradient_accumulation_steps          train.accumulation
    output_dir, logging_dir              --workdir: metrics.jsonl and tensorboard/ lie in it
    logging_steps=10                     log.every
    eval_steps=500                       eval.every
    load_best_model_at_end               checkpoint.use=best: evaluate, predict and export take the best checkpoint
    metric_for_best_model                eval.best: loss, accuracy, f1_macro, matthews, ...
    EarlyStoppingCallback(patience)      eval.patience, in evaluations
    fp16, bf16                           precision.compute=bfloat16
    group_by_length, padding             data.buckets: lengths that batches, of texts alike, are padded to;
                                         data.pack_texts: no padding
    seed                                 seed

More than one label a text: data.task=multilabel, with lists in the label's column. A number: data.task=regression.
"""

from ml_collections import ConfigDict

from configs.bert.finetune import finetune


def get_config() -> ConfigDict:
    return finetune(
        "bert_classification",
        "classification",
        num_train_epochs=3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        warmup_steps=500,
        weight_decay=0.01,
        logging_steps=10,
        eval_steps=250,
        metric_for_best_model="loss",
        early_stopping_patience=3,
        path="docstrings",
        validation_fraction=0.2,
        buckets=("32", "64", "128"),
    )
