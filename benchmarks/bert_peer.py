"""What `benchmarks/bert.py` runs in the peer's own environment: transformers.Trainer on batches that are given to it.

    PYTHON benchmarks/bert_peer.py JOB.json

The job names the model, the batches (npz), the hyper-parameters and where to write the result. Compile and evaluation
are part of the time, imports and loading are not.
"""

import json
import sys
import time

import numpy as np
import torch
import transformers


class Batches(torch.utils.data.Dataset):
    """The rows of all batches in the order that they are trained on; padded already."""

    def __init__(self, arrays):
        self.arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def __len__(self):
        return len(self.arrays["labels"])

    def __getitem__(self, row):
        return {name: array[row] for name, array in self.arrays.items()}


class InOrder(transformers.Trainer):
    """Rows as they are given: both sides see the same batches."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(path: str) -> None:
    with open(path) as stream:
        job = json.load(stream)
    torch.set_num_threads(job["threads"])
    transformers.set_seed(job["seed"])
    data = np.load(job["batches"])
    train, validation = (
        Batches({name.removeprefix(f"{side}_"): data[name] for name in data.files if name.startswith(f"{side}_")})
        for side in ("train", "validation")
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=job["num_labels"])
    arguments = transformers.TrainingArguments(
        output_dir=job["folder"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch_size"],
        per_device_eval_batch_size=job["eval_batch_size"],
        learning_rate=job["learning_rate"],
        warmup_steps=job["warmup_steps"],
        weight_decay=job["weight_decay"],
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        logging_steps=10,
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=job["seed"],
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    metric = lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}  # noqa: E731
    trainer = InOrder(model=model, args=arguments, train_dataset=train, eval_dataset=validation, compute_metrics=metric)
    began = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    found = trainer.evaluate()
    result = {
        "seconds": time.perf_counter() - began,
        "train_seconds": trained - began,
        "accuracy": found["eval_accuracy"],
        "loss": found["eval_loss"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with open(job["result"], "w") as stream:
        json.dump(result, stream)


if __name__ == "__main__":
    main(sys.argv[1])
