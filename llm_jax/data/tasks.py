"""What a run learns (data.task): which store its records are prepared into, and which stream of rows they become.

language                        tokens in a row, each predicting the next        store, packing, mixture
masked, replaced                texts and pairs with hidden or exchanged tokens  store, sentence_pairs, masking
classification and the like     labelled texts                                   labelled, labelled_rows
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from llm_jax.config.schema import LABELLED_TASKS, MASKED_TASKS, DataConfig
from llm_jax.data import labelled, labelled_rows, masking, store
from llm_jax.data.packing import Rows
from llm_jax.errors import DataError


class Stream(Protocol):
    """An endless training stream, computed from the number of a sample alone.

    Attributes:
      epoch_rows: samples of an epoch.
      rows_a_sample: rows of a batch that one sample fills.
      facts: all that rows and order depend on, by names that users know.
    """

    epoch_rows: int
    rows_a_sample: int
    facts: dict[str, str]

    def batch(self, first: int, batch_size: int, local_rows: np.ndarray) -> Rows:
        """Some rows of the batch that begins with sample `first`."""


def prepare(cfg: DataConfig) -> list[Any]:
    """The stores of a config's sources, made where they are missing (`store.prepare`, `labelled.prepare`)."""
    return [labelled.prepare(cfg)] if cfg.task in LABELLED_TASKS else store.prepare(cfg)


def make_stream(stores: Sequence[Any], cfg: DataConfig, seed: int) -> Stream:
    """The training stream of a task other than language."""
    (one,) = stores
    if cfg.task in LABELLED_TASKS:
        return labelled_rows.LabelledStream(one, cfg, seed)
    return masking.MaskedStream(one, cfg, seed)


def evaluation(
    stores: Sequence[Any], cfg: DataConfig, batch_size: int, batches: int, seed: int
) -> Callable[[Callable[[int], np.ndarray]], Iterator[Rows]]:
    """The validation batches of a task other than language, given what says which rows this process supplies.

    Raises DataError where nothing is held out.
    """
    (one,) = stores
    if cfg.task in LABELLED_TASKS:
        if one.validation is None:
            raise nothing_held_out()
        rows = labelled_rows.LabelledRows(one.validation, cfg)
        return lambda local: labelled_rows.evaluation_batches(rows, batch_size, local, batches)
    if "validation" not in one.manifest["splits"]:
        raise nothing_held_out()
    masked = masking.MaskedRows(one.split("validation"), one.tokenizer, cfg, cfg.sequence_length, seed)
    return lambda local: masking.evaluation_batches(masked, batch_size, local, seed, batches)


def feature_shapes(cfg: DataConfig, batch_size: int, num_labels: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """(shape, dtype) of each feature of a batch of the longest rows, of a task other than language."""
    rows, length = batch_size * labelled.texts_a_record(cfg), cfg.sequence_length
    texts = labelled_rows.MOST_TEXTS if cfg.pack_texts else 1
    whole = ("tokens", "segment_ids", "positions", "token_types")
    found = {name: ((rows, length), np.int32) for name in whole} | {"starts": ((rows, texts), np.int32)}
    if cfg.task not in LABELLED_TASKS:
        masked = (rows, masking.predictions(cfg, length))
        found |= {"masked_positions": (masked, np.int32), "masked_targets": (masked, np.int32)}
        found |= {"masked_weights": (masked, np.float32)}
        found |= {"pair_labels": ((rows, texts), np.int32), "pair_weights": ((rows, texts), np.float32)}
        return found | ({"masked_draws": (masked, np.float32)} if cfg.task == "replaced" else {})
    found["text_ids"] = ((rows, texts), np.int32)
    own = {"tokens": (rows, length), "questions": (rows, texts, 2), "regression": (rows, texts, 1)}
    own["multilabel"] = (rows, texts, num_labels)
    if cfg.task != "similarity":
        dtype = np.float32 if cfg.task in ("regression", "multilabel") else np.int32
        found["labels"] = (own.get(cfg.task, (rows, texts)), dtype)
    return found


def head_shares(cfg: DataConfig) -> dict[str, float]:
    """The share of a row's tokens that each head is computed at, by its name among the parameters: what FLOPs count.

    Of a packed row's texts the first alone counts, for how many there are the data know.
    """
    one = 1 / cfg.sequence_length
    if cfg.task in MASKED_TASKS:  # of "replaced" the generator's
        return {"masked": masking.predictions(cfg, cfg.sequence_length) * one, "pairs": one}
    return {"labels": one} if cfg.task in ("classification", "multilabel", "regression", "choice") else {}


def nothing_held_out() -> DataError:
    return DataError(
        "There is nothing to evaluate on: the data source has no validation split. Set data.validation_fraction above "
        "0, or data.validation_path."
    )


class TaskBatches:
    """This process's rows of the batches from sample `start` on, as a random-access source for Grain."""

    def __init__(self, stream: Stream, batch_size: int, local_rows: np.ndarray, start: int):
        self._stream, self._batch_size, self._local_rows, self._start = stream, batch_size, local_rows, start

    def __len__(self) -> int:
        return 2**62 // self._batch_size  # endless

    def __getitem__(self, number: int) -> Rows:
        rows = self._stream.batch(self._start + number * self._batch_size, self._batch_size, self._local_rows)
        return {name: array[None] for name, array in rows.items()}  # a group of one batch

    def __repr__(self) -> str:
        return f"TaskBatches(start={self._start})"
