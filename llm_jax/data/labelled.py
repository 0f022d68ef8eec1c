"""Labelled records as encoded texts and labels: what fine-tuning an encoder reads.

    classification  one of data.columns.names            labels (texts,) int32
    multilabel      any number of them                   labels (texts, names) float32, 0 or 1
    regression      a number                             labels (texts, 1) float32
    tokens          a label a word                       labels (pieces,) int32: at a word's first piece, -1 elsewhere
    questions       where in the context the answer is   labels (texts, 2) int32: first and last piece; 0, 0: nowhere
    choice          which of several endings             labels (texts,) int32, the same at all texts of a record
    similarity      none: the other records are unlike   no labels

Texts of records with several (choice, similarity) follow one another. Everything lies in memory: labelled sets do.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_jax.config.schema import ColumnsConfig, DataConfig
from llm_jax.data import questions, tokenizers
from llm_jax.data.splits import held_out
from llm_jax.data.tables import Record, read_table
from llm_jax.data.text_pieces import Pieces, TextEncoder
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import ConfigError, DataError

NAMED = ("classification", "multilabel", "tokens")  # tasks whose labels have names
LARGEST = float(np.finfo(np.float32).max)  # that a number to be predicted may be
UNLABELLED = -1  # the id at pieces that no label belongs to


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The encoded texts of one split; text i is tokens[offsets[i]:offsets[i + 1]].

    Attributes:
      records: what they came from, for messages and answers.
      record: (texts,) the record of each text.
      labels: as the task has them; None where records have no labels (prediction).
      pieces: of each text, where a task needs to find its way back to words or characters; else empty.
    """

    tokens: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    records: list[Record]
    record: np.ndarray
    labels: np.ndarray | None
    pieces: list[Pieces]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def counts(self) -> dict[str, int]:
        return {"records": len(self.records), "texts": len(self), "tokens": len(self.tokens)}

    @property
    def fingerprint(self) -> str:
        arrays = [self.tokens, self.types, self.offsets, *([] if self.labels is None else [self.labels])]
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledStore:
    """Training and validation examples of a source, with what the loop knows of any store."""

    name: str
    path: str  # of the records
    tokenizer: Tokenizer
    names: tuple[str, ...]  # of the labels, by id
    train: Examples
    validation: Examples | None
    weight: float = 1.0

    @property
    def manifest(self) -> dict[str, Any]:
        sides = {"train": self.train} | ({"validation": self.validation} if self.validation else {})
        return {
            "splits": {side: examples.counts for side, examples in sides.items()},
            "source": {"path": self.path},
            "yardsticks": {},
        }


# ------------------------------------------------------------------------------------------------ preparing


def prepare(cfg: DataConfig) -> LabelledStore:
    """Read, check and encode the records of a labelled task.

    Raises:
      DataError: a record that cannot be used, with its file, row and column.
      ConfigError: a tokenizer that does not fit the task.
    """
    ((name, source),) = cfg.sources().items()
    tokenizer = tokenizers.read(cfg.tokenizer)
    training, validation = [], []
    for record in read_table(source):
        held = not source.validation_path and held_out(record.group, cfg.validation_fraction)
        (validation if held else training).append(record)
    if source.validation_path:
        validation = list(read_table(source, validation=True))
    if not training:
        raise DataError(f"{source.path}: all {len(validation)} records are held out; lower data.validation_fraction, "
                        "or give data.validation_path.")  # fmt: skip
    if cfg.validation_fraction and not source.validation_path and not validation:
        raise DataError(f"{source.path}: data.validation_fraction = {cfg.validation_fraction:g} holds out none of its "
                        f"{len(training)} records; raise it, give data.validation_path, or set it to 0.")  # fmt: skip
    names = label_names(cfg, training)
    encode = Encoder(cfg, tokenizer, names)
    return LabelledStore(
        name, source.path, tokenizer, names, encode(training), encode(validation) if validation else None
    )


def num_labels(cfg: DataConfig, names: Sequence[str]) -> int:
    """Outputs of the model's head."""
    return len(names) if cfg.task in NAMED else 2 if cfg.task == "questions" else 1


def label_names(cfg: DataConfig, records: Sequence[Record]) -> tuple[str, ...]:
    """The labels in the order of their ids: data.columns.names, else what the records have, numbers by their size."""
    column, first = cfg.columns.label, {}
    if cfg.task == "questions" and not any(questions.answers_of(record, cfg.columns) for record in records):
        raise DataError(f"{records[0].file}, column {column!r}: no training record has an answer in its context, so "
                        "that there is nothing to learn; give records that have one.")  # fmt: skip
    if cfg.task not in NAMED:
        return ()
    for record in records:
        for label in given_labels(cfg.task, record, column):
            first.setdefault(label, record)
    if given := cfg.columns.names:
        if len(set(given)) < len(given):
            raise ConfigError("data.columns.names: a label is named twice; name each once")
        for label, record in first.items():
            known_label(label, given, record, column)
        if unseen := [label for label in given if label not in first]:
            raise DataError(f"{records[0].file}, column {column!r}: no training record has the label {unseen[0]!r} of "
                            "data.columns.names; leave it out, or give records of it.")  # fmt: skip
        return given
    numeric = all(label.removeprefix("-").isdecimal() for label in first)
    names = tuple(sorted(first, key=lambda label: (int(label), label) if numeric else label))
    if len(names) < (1 if cfg.task == "multilabel" else 2):
        there = f"no other label than {names[0]!r}" if names else "no label"
        raise DataError(f"{records[0].file}, column {column!r}: the training records have {there}, so that there is "
                        "nothing to learn; give records of another.")  # fmt: skip
    return names


def given_labels(task: str, record: Record, column: str) -> list[str]:
    """The labels of a record, as text."""
    value = record[column]
    if task != "classification" and isinstance(value, str):  # a CSV file has no lists
        value = value.split()
    many = value if task != "classification" else [value]
    if not isinstance(many, list):
        raise record.error(column, f"{value!r:.40} stands where a list of labels belongs", "write a list")
    for label in many:
        if label is None or isinstance(label, (bool, float, list, dict)) or label == "":
            raise record.error(column, f"{label!r:.40} stands where a label belongs", "give a name or a whole number")
    return [record.sound(column, str(label)) for label in many]


def known_label(label: str, names: Sequence[str], record: Record, column: str) -> int:
    """The label's id. Raises DataError where it is not one of the names."""
    if label not in names:
        listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise record.error(column, f"the label {label!r} is not one of the {len(names)} labels ({listed})",
                           "correct it, or add records of it to the training data")  # fmt: skip
    return names.index(label)


# ------------------------------------------------------------------------------------------------- encoding


class Encoder:
    """Records to examples.

    Args:
      cfg: task, columns, sequence length.
      tokenizer: of an encoder.
      names: of the labels.
    """

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, names: Sequence[str]):
        self.cfg, self.names = cfg, names
        self._ids = {name: id for id, name in enumerate(names)}
        stride = cfg.stride if cfg.task == "questions" else 0
        self._encoder = TextEncoder(tokenizer, cfg.sequence_length, stride)

    def __call__(self, records: Sequence[Record], labelled: bool = True) -> Examples:
        """Raises DataError: a record that cannot be used."""
        texts, record, labels = self._by_task(list(records), labelled)
        lengths = np.array([len(text.tokens) for text in texts], np.int64)
        keep = self.cfg.task in ("tokens", "questions")
        return Examples(
            tokens=np.concatenate([text.tokens for text in texts]) if texts else np.zeros(0, np.int32),
            types=np.concatenate([text.types for text in texts]) if texts else np.zeros(0, np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            records=list(records),
            record=np.asarray(record, np.int64),
            labels=labels if labelled else None,
            pieces=texts if keep else [],
        )

    def _by_task(self, records: list[Record], labelled: bool) -> tuple[list[Pieces], Sequence[int], Any]:
        columns, task = self.cfg.columns, self.cfg.task
        if task == "questions":
            return questions.windows(records, columns, self._encoder, labelled)
        if task == "tokens":
            words = [words_of(record, columns.text) for record in records]
            texts = self._encoder.encode_words(words)
            for record, text, own in zip(records, texts, words, strict=True):
                self._require_pieces(record, text, own)
            labels = [self._piece_labels(*each) for each in zip(records, words, texts, strict=True)] if labelled else []
            return texts, range(len(records)), np.concatenate(labels) if labels else None
        given = [text for record in records for text in texts_of(record, columns, task)]
        read = columns_of(columns, task)
        several = len(read)
        texts = self._encoder.encode(given)
        for number, text in enumerate(texts):
            for place, column in enumerate(read[number % several]):
                if not (text.sequence == place).any():
                    raise records[number // several].error(column, "the tokenizer leaves nothing of the text",
                                                           "leave the row out, or give it a text")  # fmt: skip
        makers: dict[str, Callable[[Record], Any]] = {
            "classification": self._class, "multilabel": self._classes, "regression": self._number,
            "choice": self._choice,
        }  # fmt: skip
        labels = None
        if labelled and task in makers:
            dtype = np.float32 if task in ("multilabel", "regression") else np.int32
            labels = np.repeat(np.array([makers[task](record) for record in records], dtype), several, axis=0)
        return texts, np.repeat(np.arange(len(records)), several), labels

    def _require_pieces(self, record: Record, text: Pieces, words: list[str]) -> None:
        """Refuse a word without a piece, for it has no place for its label; what the row's end cut off is no such."""
        whole = len(words) if len(text.tokens) < self._encoder.length else int(text.words.max(initial=-1))
        if lost := set(range(whole)) - set(text.words.tolist()):
            found = f"the tokenizer leaves nothing of the word {words[min(lost)]!r:.40}"
            raise record.error(self.cfg.columns.text, found, "leave it out, with its label")

    def _class(self, record: Record) -> int:
        (label,) = given_labels("classification", record, self.cfg.columns.label)
        return self._id(label, record)

    def _classes(self, record: Record) -> np.ndarray:
        found = np.zeros(len(self.names), np.float32)
        for label in given_labels("multilabel", record, self.cfg.columns.label):
            found[self._id(label, record)] = 1
        return found

    def _number(self, record: Record) -> list[float]:
        value = record[self.cfg.columns.label]
        try:
            number = float(value)
            if isinstance(value, bool) or not abs(number) <= LARGEST:
                raise ValueError
        except (TypeError, ValueError):
            raise record.error(self.cfg.columns.label, f"{value!r:.40} stands where a finite number belongs",
                               "correct it, or leave the row out") from None  # fmt: skip
        return [number]

    def _choice(self, record: Record) -> int:
        value, count = record[self.cfg.columns.label], len(self.cfg.columns.choices)
        if not str(value).isdecimal() or int(value) >= count:
            raise record.error(self.cfg.columns.label, f"{value!r:.40} names none of the {count} choices",
                               f"give a number from 0 to {count - 1}")  # fmt: skip
        return int(value)

    def _piece_labels(self, record: Record, words: list[str], text: Pieces) -> np.ndarray:
        """(pieces,) int32: the word's label at its first piece, -1 elsewhere."""
        column = self.cfg.columns.label
        labels = given_labels("tokens", record, column)
        if len(labels) != len(words):
            found = f"there are {len(labels)} labels for {len(words)} words"
            raise record.error(column, found, "give one label a word")
        ids = np.array([self._id(label, record) for label in labels], np.int32)
        first = np.diff(text.words, prepend=-1) != 0
        return np.where((text.words >= 0) & first, ids[np.maximum(text.words, 0)], UNLABELLED).astype(np.int32)

    def _id(self, label: str, record: Record) -> int:
        found = self._ids.get(label)
        return known_label(label, self.names, record, self.cfg.columns.label) if found is None else found


def words_of(record: Record, column: str) -> list[str]:
    value = record[column]
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise record.error(column, f"{value!r:.40} is not a list of words, none of them empty", "write a list of texts")
    return [record.sound(column, word) for word in words]


def texts_of(record: Record, columns: ColumnsConfig, task: str) -> list[str | tuple[str, str]]:
    """The texts or pairs of a record that the model reads, one row or segment each."""
    read = [tuple(record.text(column) for column in names) for names in columns_of(columns, task)]
    return [texts if len(texts) == 2 else texts[0] for texts in read]


def columns_of(columns: ColumnsConfig, task: str) -> list[tuple[str, ...]]:
    """The column of each text, or the two of each pair, that a record has for the model."""
    if task == "choice":
        return [(columns.text, column) for column in columns.choices]
    if task == "similarity":
        return [(column,) for column in (columns.text, columns.pair, columns.negative) if column]
    return [(columns.text, columns.pair) if columns.pair else (columns.text,)]


def texts_a_record(cfg: DataConfig) -> int:
    """How many texts each record of a task has."""
    return len(columns_of(cfg.columns, cfg.task))


# ------------------------------------------------------------------------------------------------ in a run's folder


def describe(cfg: DataConfig, names: Sequence[str]) -> str:
    """The labels as a run's folder keeps them."""
    return json.dumps({"task": cfg.task, "names": list(names)}, indent=1) + "\n"
