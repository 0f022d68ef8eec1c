"""What all recipes of fine-tuning an encoder share, in the terms that people know."""

from ml_collections import ConfigDict

HEADS = {"tokens": "token", "questions": "token", "similarity": "embedding", "classification": "text", "choice": "text"}


def finetune(
    name: str,
    task: str,
    *,
    num_train_epochs: float = 3,
    per_device_train_batch_size: int = 16,
    per_device_eval_batch_size: int = 64,
    num_devices: int = 1,
    learning_rate: float = 5e-5,
    warmup_steps: int = 500,
    weight_decay: float = 0.01,
    logging_steps: int = 10,
    eval_steps: int = 500,
    max_length: int = 128,
    metric_for_best_model: str = "loss",
    early_stopping_patience: int = 0,
    **data: object,
) -> ConfigDict:
    """A run that starts from a checkpoint and keeps its best one. `data`: more keys of data.*."""
    return ConfigDict(
        dict(
            name=name,
            # All else is taken from the checkpoint; of a run of yours, scan_layers too. Layers compiled one by one are
            # faster in small models.
            model=dict(family="encoder", head=HEADS[task], scan_layers=False),
            data=dict(task=task, sequence_length=max_length, **data),
            train=dict(epochs=float(num_train_epochs), global_batch_size=per_device_train_batch_size * num_devices),
            optim=dict(
                learning_rate=learning_rate,
                schedule="linear",
                final_ratio=0.0,
                warmup_steps=warmup_steps,
                warmup_form="i/w",
                beta2=0.999,
                weight_decay=weight_decay,
                clip_norm=1.0,
            ),
            eval=dict(
                every=eval_steps,
                batch_size=per_device_eval_batch_size * num_devices,
                best=metric_for_best_model,
                patience=early_stopping_patience,
            ),
            checkpoint=dict(every=eval_steps, use="best", keep_best=1, keep_latest=1),
            log=dict(every=logging_steps),
        )
    )
