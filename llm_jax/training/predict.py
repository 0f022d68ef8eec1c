"""`llm-jax predict`: labels and scores, or embeddings, of new records, in batches, as they are read."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from llm_jax.config import Config
from llm_jax.config.schema import LABELLED_TASKS, SourceConfig
from llm_jax.data.labelled import NAMED, Encoder, columns_of
from llm_jax.data.labelled_rows import LabelledRows, evaluation_batches
from llm_jax.data.labelled_scores import predictions
from llm_jax.data.progress import Progress
from llm_jax.data.sources import find_files
from llm_jax.data.tables import Record, read_table
from llm_jax.errors import DataError, UserError
from llm_jax.objectives import registry as objectives
from llm_jax.training import restore, run_folder
from llm_jax.training.restore import TrainedModel

CHUNK = 1024  # records that are encoded at a time; those of like length among them share batches


class Predictor:
    """A trained model with what turns records into predictions. Compiled once for each bucket.

    Args:
      run: of a labelled task.
      names: of the labels.
      batch_size: records of a batch.
      embeddings: the vector of each record's text, where the run learned similarity, in place of a cosine.
    """

    def __init__(self, run: TrainedModel, names: Sequence[str], batch_size: int = 0, embeddings: bool = False):
        cfg = of_texts_alone(run.cfg) if embeddings else run.cfg
        if cfg.data.task not in LABELLED_TASKS:
            decoder = cfg.data.task == "language"
            instead = "llm-jax generate continues text" if decoder else "fine-tune it on labels first"
            raise UserError(f"predict gives labels, and this run's data.task is {cfg.data.task!r}; {instead}")
        if jax.process_count() > 1:
            raise UserError("predict runs as one process: start it on one machine, without the others")
        numbered = tuple(f"LABEL_{label}" for label in range(run.cfg.model.num_labels))  # of a checkpoint without names
        self.cfg, self.names, self.run = cfg, tuple(names) or (numbered if cfg.data.task in NAMED else ()), run
        layout = run.model.module.layout
        wanted = batch_size or cfg.eval.batch_size or cfg.train.global_batch_size
        self.batch_size = -(-wanted // layout.batch_shards) * layout.batch_shards
        self._layout, self._encode = layout, Encoder(cfg.data, run.tokenizer, self.names)
        objective = objectives.make(cfg)
        self._evaluate = jax.jit(
            lambda params, batch: objective.evaluation(run.model, params, batch), out_shardings=layout.replicated
        )

    def __call__(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """The prediction of each record (`labelled_scores.predictions`)."""
        if not records:
            return []
        examples = self._encode(records, labelled=False)
        rows = LabelledRows(examples, self.cfg.data)
        batches = evaluation_batches(rows, self.batch_size, self._layout.batch_rows)
        found = [self._evaluate(self.run.params, self._put(batch, rows)) for batch in batches]
        kept = [{name: np.asarray(array) for name, array in jax.device_get(batch).items()} for batch in found]
        return predictions(self.cfg.data, self.names, examples, kept)

    def _put(self, batch: Any, rows: LabelledRows) -> dict[str, jax.Array]:
        return self._layout.put_batch(batch, self.batch_size * rows.texts_a_record)


def of_texts_alone(cfg: Config) -> Config:
    """A similarity run's config with one text a record. Raises UserError where the run has no embeddings."""
    if cfg.data.task != "similarity":
        raise UserError(f"embeddings are of runs with data.task=similarity, and this run's is {cfg.data.task!r}; train "
                        "one with configs/bert/finetune_similarity.py, or convert a model that has them")  # fmt: skip
    columns = dataclasses.replace(cfg.data.columns, pair="", negative="")
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, columns=columns))


def open_run(
    workdir: str,
    step: int | None = None,
    overrides: Sequence[str] = (),
    batch_size: int = 0,
    embeddings: bool = False,
) -> Predictor:
    """The predictor of a run, needing nothing but its folder."""
    run = restore.restore(workdir, step, overrides)
    return Predictor(run, run_folder.read_labels(workdir), batch_size, embeddings)


def predict(
    workdir: str,
    input: str,
    output: str = "-",
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
    batch_size: int = 0,
    embeddings: bool = False,
) -> int:
    """Write one JSON object a record, {"row", ...}, in the order of the input; returns how many.

    Args:
      workdir: the run's folder.
      input: a jsonl, csv, tsv or parquet file (or a folder, or glob, of them) with the columns that the run read.
      output: a file, which gets its name when all is written; "-" is standard output.
      step: which checkpoint; None: the run's latest, or best.
      embeddings: write {"row", "embedding"} of the text in data.columns.text, whatever other columns there are.

    Raises:
      DataError: a record that cannot be read, with its file, row and column.
    """
    files = find_files(input, "--input")  # told before a model is loaded
    if output != "-" and os.path.exists(output) and any(os.path.samefile(file.path, output) for file in files):
        raise UserError(f"--output={output}: that is the input, which would be lost; give another file")
    predictor = open_run(workdir, step, overrides, batch_size, embeddings)
    count = 0
    with opened(output) as out, Progress().counting("predicting", sum(file.size for file in files)) as advance:
        for chunk in chunks(read_table(SourceConfig(path=input), meter=lambda size: advance(size, 0)), CHUNK):
            for record, found in zip(chunk, predictor(chunk), strict=True):
                out.write(json.dumps({"row": record.row} | found, ensure_ascii=False) + "\n")
            count += len(chunk)
            advance(0, len(chunk))
    return count


def chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    records = iter(records)
    while chunk := list(itertools.islice(records, size)):
        yield chunk


@contextlib.contextmanager
def opened(output: str) -> Iterator[TextIO]:
    """Standard output, or a file that appears under its name when it is whole."""
    if output == "-":
        yield sys.stdout
        return
    partial = f"{output}.partial"
    try:
        stream = open(partial, "w", encoding="utf-8")  # noqa: SIM115 closed below, before it is renamed
    except OSError as error:
        raise UserError(f"--output={output}: it cannot be written ({error.strerror}); give another file") from None
    try:
        with stream:
            yield stream
        os.replace(partial, output)
    except BaseException:
        os.unlink(partial)
        raise


def records_of(texts: Sequence[Any], cfg: Config) -> list[Record]:
    """Records of texts, pairs of texts (tuples), or dicts by column.

    Raises DataError: a single text in place of several, or as many texts in a record as the run does not read.
    """
    if isinstance(texts, str):
        raise DataError(f"{texts!r:.40} is one text where a list of them belongs; put it in brackets")
    names = list(dict.fromkeys(itertools.chain(*columns_of(cfg.data.columns, cfg.data.task))))
    found = []
    for number, text in enumerate(texts, 1):
        several = text if isinstance(text, tuple) else (text,)
        if not isinstance(text, dict) and len(several) != len(names):
            raise DataError(
                f"the given texts, row {number}: {len(several)} of them where the run reads {len(names)} a record "
                f"({', '.join(names)}); give a tuple of as many, or a dict"
            )
        values = dict(text) if isinstance(text, dict) else dict(zip(names, several, strict=True))
        found.append(Record("the given texts", number, values, str(number)))
    return found
