"""Fine-tuning in a few lines, for notebooks: `from llm_jax import finetune`.

    from llm_jax import finetune

    model = finetune("hf:bert-base-uncased", "train.csv", validation="dev.csv", num_train_epochs=3)
    print(model.evaluate())
    print(model.predict(["a text", "another"]))

It is `llm-jax train` with the keys that configs/bert/finetune_classification.py lists, and nothing else.
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax import config
from llm_jax.backend import start_backend
from llm_jax.config import Config
from llm_jax.config.schema import LABELLED_TASKS
from llm_jax.config.tasks import HEADS
from llm_jax.data import tasks
from llm_jax.errors import ConfigError, DataError
from llm_jax.training import predict, pretrained, restore, train

Records = str | Sequence[Mapping[str, Any]]  # a file, or dicts by column


@dataclasses.dataclass
class FineTuned:
    """A fine-tuned model in its run's folder, for `llm-jax predict` and the rest of the commands too."""

    workdir: str
    cfg: Config
    _predictor: predict.Predictor | None = None
    _embedder: predict.Predictor | None = None

    def evaluate(self) -> dict[str, float]:
        """The figures of its best checkpoint on the validation records."""
        return restore.evaluate(self.workdir)

    def predict(self, texts: Sequence[Any]) -> list[dict[str, Any]]:
        """Labels and scores of texts, pairs of texts (tuples), or records (dicts by column)."""
        if self._predictor is None:
            self._predictor = predict.open_run(self.workdir)
        return self._predictor(predict.records_of(texts, self.cfg))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of texts, (texts, D) float64, each of length 1; of a run with task="similarity"."""
        if self._embedder is None:
            known = self._predictor or predict.open_run(self.workdir, embeddings=True)
            self._embedder = predict.Predictor(known.run, known.names, embeddings=True)
        found = self._embedder(predict.records_of(texts, self._embedder.cfg))
        return np.array([one["embedding"] for one in found]).reshape(len(found), self.cfg.model.embed_dim)


def finetune(
    model: str,
    train_records: Records,
    validation: Records = "",
    *,
    task: str = "classification",
    text: str = "text",
    pair: str = "",
    label: str = "label",
    output_dir: str = "",
    num_train_epochs: float = 3,
    per_device_train_batch_size: int = 16,
    per_device_eval_batch_size: int = 64,
    learning_rate: float = 5e-5,
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.01,
    max_length: int = 128,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> FineTuned:
    """Fine-tune a pre-trained encoder; returns the model of the best epoch.

    Args:
      model: "hf:PATH_OR_NAME" of a checkpoint, or the folder of a run of ours.
      train_records: a jsonl, csv, tsv or parquet file, or dicts by column.
      validation: likewise; "": a tenth of the training records is held out.
      task: of data.task: classification, multilabel, regression, tokens, questions, choice, similarity.
      text, pair, label: the names of the columns.
      output_dir: folder of the run; "": a new temporary one.
      warmup_ratio: of all steps.
      overrides: any other keys, such as "mesh.fsdp=-1" or "eval.best=f1_macro".

    Raises:
      UserError: what was given cannot be used; the message says what and why.
    """
    if task not in LABELLED_TASKS:
        raise ConfigError(f"task={task!r} is not one of {', '.join(LABELLED_TASKS)}")
    start_backend()
    import jax

    workdir = os.path.abspath(output_dir or tempfile.mkdtemp(prefix="llm_jax_finetune_"))
    os.makedirs(workdir, exist_ok=True)
    devices = jax.device_count()
    cfg = config.from_dict(
        dict(
            name=os.path.basename(workdir),
            seed=seed,
            model=dict(family="encoder", head=HEADS[task][0]),
            data=dict(
                task=task,
                path=as_file(train_records, workdir, "train"),
                validation_path=as_file(validation, workdir, "validation"),
                validation_fraction=0.0 if validation else 0.1,
                columns=dict(text=text, pair=pair) | ({} if task == "similarity" else dict(label=label)),
                sequence_length=max_length,
                buckets=[str(size) for size in (32, 64, 128, 256) if size < max_length],
            ),
            train=dict(epochs=float(num_train_epochs), global_batch_size=per_device_train_batch_size * devices),
            optim=dict(
                learning_rate=learning_rate,
                schedule="linear",
                final_ratio=0.0,
                warmup_ratio=warmup_ratio,
                warmup_form="i/w",
                beta2=0.999,
                weight_decay=weight_decay,
            ),  # fmt: skip
            eval=dict(batch_size=per_device_eval_batch_size * devices),
            checkpoint=dict(init_from=model, use="best", keep_latest=1),
        )
    )
    given = config.given("", overrides) | {"model.family"}
    cfg = pretrained.adopt(config.override(cfg, overrides), given)
    config.check(cfg)
    start_backend(cfg)
    rows = tasks.make_stream(tasks.prepare(cfg.data), cfg.data, cfg.seed).epoch_rows
    epoch = max(rows // cfg.train.global_batch_size, 1)
    cfg = config.override(cfg, [f"eval.every={epoch}", f"checkpoint.every={epoch}", *overrides])
    train.train(cfg, workdir)
    return FineTuned(workdir, restore.read_config(workdir))


def as_file(records: Records, workdir: str, name: str) -> str:
    """The path of a file, or of one that is written of the records in the run's folder."""
    if isinstance(records, str):
        return records
    path = os.path.join(workdir, f"{name}.jsonl")
    with open(path, "w", encoding="utf-8") as stream:
        for number, record in enumerate(records, 1):
            words = functools.partial(plain, f"record {number} of {name}")
            stream.write(json.dumps(dict(record), default=words) + "\n")
    return path


def plain(where: str, value: Any) -> Any:
    """A value of numpy's as Python's own, which JSON can say. Raises DataError for one of another kind."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise DataError(
        f"{where}: {value!r:.40} is a {type(value).__name__}; give text, a number, or a list of them in its place"
    )
