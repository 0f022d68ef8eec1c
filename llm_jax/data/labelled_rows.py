"""Encoded texts as rows of one length: several short ones, or one, padded to the shortest bucket that holds it.

A batch is a dict of arrays, with B rows of T places and S texts a row at most:

    tokens, segment_ids, positions, token_types   (B, T) int32   segments 1, 2, ...; 0: padding
    starts                                        (B, S) int32   place of each text's first token
    text_ids                                      (B, S) int32   number of each text in its split; -1: there is none
    labels                                        (B, S) int32 or (B, S, L) float32; tokens: (B, T) int32, -1: none;
                                                  questions: (B, S, 2) int32 places in the row

Records with several texts (choice, similarity) have one text a row, and text c of record b stands in row c * B + b.
All rows of a batch are padded to the same bucket, which follows from the whole global batch: so there are as many
shapes as buckets, and every process chooses the same one. Shuffled rows of one bucket are drawn together.
"""

from collections.abc import Callable, Iterator

import numpy as np

from llm_jax.config import tasks
from llm_jax.config.schema import DataConfig
from llm_jax.data.labelled import UNLABELLED, Examples, LabelledStore, texts_a_record
from llm_jax.data.mixture import BLOCK, shuffled_block
from llm_jax.data.packing import Rows
from llm_jax.data.shuffle import stream_key, uniform

MOST_TEXTS = 32  # in a packed row
VERSION = 2  # of the order and of packing; another gives another stream


class LabelledRows:
    """The rows of a split, by number: each the texts that share it."""

    def __init__(self, examples: Examples, cfg: DataConfig):
        self.examples, self.task, self.texts_a_record = examples, cfg.task, texts_a_record(cfg)
        self.buckets = tasks.buckets(cfg)
        self.length = self.buckets[-1]
        if cfg.pack_texts:
            self.members = pack(examples.lengths, self.length, MOST_TEXTS)
        else:
            self.members = [[text] for text in range(0, len(examples), self.texts_a_record)]
        self.most = max(map(len, self.members), default=1)
        self.filled = np.array([examples.lengths[texts].sum() for texts in self.members], np.int64)
        if self.texts_a_record > 1:  # a record is as long as its longest text
            self.filled = examples.lengths.reshape(-1, self.texts_a_record).max(1)

    def __len__(self) -> int:
        return len(self.members)

    def bucket(self, numbers: np.ndarray) -> int:
        """The length that rows with these numbers are padded to; numbers beyond the last are rows of padding."""
        longest = int(self.filled[numbers[numbers < len(self)]].max(initial=0))
        return self.buckets[np.searchsorted(self.buckets, longest)]

    def batch(self, numbers: np.ndarray, which: np.ndarray, length: int) -> Rows:
        """Rows of `length` places: text `which[i]` of the records of row `numbers[i]`."""
        examples, shape, texts = self.examples, (len(numbers), length), (len(numbers), self.most)
        rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions", "token_types")}
        rows |= {"starts": np.zeros(texts, np.int32), "text_ids": np.full(texts, -1, np.int32)}
        if (given := examples.labels) is not None:
            if self.task == "tokens":
                rows["labels"] = np.full(shape, UNLABELLED, np.int32)
            else:
                rows["labels"] = np.zeros((*texts, *given.shape[1:]), given.dtype)
        for row, (number, one) in enumerate(zip(numbers.tolist(), which.tolist(), strict=True)):
            place = 0
            for slot, text in enumerate(self.members[number] if number < len(self) else ()):
                text += one
                begin, end = examples.offsets[text], examples.offsets[text + 1]
                here = slice(place, place + end - begin)
                rows["tokens"][row, here] = examples.tokens[begin:end]
                rows["token_types"][row, here] = examples.types[begin:end]
                rows["segment_ids"][row, here] = slot + 1
                rows["positions"][row, here] = np.arange(end - begin)
                rows["starts"][row, slot], rows["text_ids"][row, slot] = place, text
                if given is not None and self.task == "tokens":
                    rows["labels"][row, here] = given[begin:end]
                elif given is not None:
                    rows["labels"][row, slot] = given[text] + (place if self.task == "questions" else 0)
                place += int(end - begin)
        return rows


def pack(lengths: np.ndarray, room: int, most: int) -> list[list[int]]:
    """Texts that share a row: the longest first, each into the fullest row that still holds it.

    Args:
      lengths: (texts,) tokens of each.
      room: tokens of a row.
      most: texts of a row.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows that have room for so many more tokens
    open_rooms = np.zeros(room + 1, bool)
    for text in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[text])
        fitting = int(np.argmax(open_rooms[size:])) + size if open_rooms[size:].any() else -1
        if fitting < 0:
            row, left = len(rows), room - size
            rows.append([])
        else:
            row, left = by_room[fitting].pop(), fitting - size
            open_rooms[fitting] = bool(by_room[fitting])
        rows[row].append(text)
        if left and len(rows[row]) < most:
            by_room[left].append(row)
            open_rooms[left] = True
    return rows


class LabelledStream:
    """The endless training stream: each epoch a permutation of the rows, by arithmetic from the sample's number.

    A pool of neighbours in that order is drawn bucket by bucket, the buckets in random order, so that batches much
    smaller than a pool need little more room than their own rows. Not so in task "similarity", where the texts of a
    batch are told from one another: they stay any texts.
    """

    def __init__(self, store: LabelledStore, cfg: DataConfig, seed: int):
        self.rows = LabelledRows(store.train, cfg)
        self.rows_a_sample = self.rows.texts_a_record
        self._name, self._seed, self._shuffle = store.name, seed, cfg.shuffle
        self._pools = len(self.rows.buckets) > 1 and cfg.task != "similarity"
        self.facts = {
            "order version": f"labelled {VERSION}",
            "seed": str(seed),
            "data.task": cfg.task,
            "data.sequence_length": str(cfg.sequence_length),
            "data.buckets": ",".join(map(str, self.rows.buckets)),
            "data.pack_texts": str(cfg.pack_texts),
            "data.shuffle": str(cfg.shuffle),
            f"examples of source {store.name}": store.train.fingerprint,
        }

    @property
    def epoch_rows(self) -> int:
        return len(self.rows)

    def batch(self, first: int, batch_size: int, local_rows: np.ndarray) -> Rows:
        """Some rows of the batch that begins with sample `first`."""
        numbers = self._numbers(first + np.arange(batch_size))
        which, sample = np.divmod(local_rows, batch_size)
        return self.rows.batch(numbers[sample], which, self.rows.bucket(numbers))

    def _numbers(self, samples: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(samples, len(self.rows))
        if not self._shuffle:
            return places
        numbers, blocks = np.empty_like(places), places // BLOCK
        for epoch, block in set(zip(epochs.tolist(), blocks.tolist(), strict=True)):
            here = (epochs == epoch) & (blocks == block)
            order = shuffled_block(self._seed, self._name, len(self.rows), epoch, block)
            order = self._by_bucket(order, epoch, block) if self._pools else order
            numbers[here] = order[places[here] % BLOCK]
        return numbers

    def _by_bucket(self, order: np.ndarray, epoch: int, block: int) -> np.ndarray:
        """The rows of a block, those of each pool (a quarter of the data at most) by a random rank of their buckets."""
        buckets, size = self.rows.buckets, max(len(self.rows) // 4, 1)
        pools, own = np.arange(len(order)) // size, np.searchsorted(buckets, self.rows.filled[order])
        rank = uniform(pools * len(buckets) + own, stream_key(self._seed, "buckets", self._name, epoch, block))
        return order[np.lexsort((rank, pools))]


def evaluation_batches(
    rows: LabelledRows, batch_size: int, local_rows: Callable[[int], np.ndarray], batches: int = 0
) -> Iterator[Rows]:
    """Rows of a split once, those of like length together; the last batch is filled up with padding.

    Args:
      local_rows: from a number of rows to those that this process supplies.
      batches: only those of the first so many batches in the split's own order; 0: all.
    """
    count = min(batches * batch_size, len(rows)) if batches else len(rows)
    order = np.argsort(rows.filled[:count], kind="stable")
    mine = local_rows(batch_size * rows.texts_a_record)
    which, sample = np.divmod(mine, batch_size)
    for first in range(0, count, batch_size):
        numbers = np.full(batch_size, len(rows))
        here = order[first : first + batch_size]
        numbers[: len(here)] = here
        yield rows.batch(numbers[sample], which, rows.bucket(numbers))
