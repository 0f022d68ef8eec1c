"""Rows of one length cut from a stream of tokens, each made on demand from its number alone.

A row is a dict of arrays of shape (T,), a batch of rows of shape (rows, T); T is data.sequence_length:

    tokens         int32    inputs
    targets        int32    the token after each input
    segment_ids    int32    1, 2, ... for the documents in the row; 0: padding
    positions      int32    from 0 in each segment
    loss_weights   float32  1 where the target counts, else 0
    target_bytes   int32    bytes of UTF-8 that a counted target stands for, where the tokenizer knows them

Padding is 0 in every feature. Without data.mask_documents all that is not padding is segment 1.

    concat      row r covers tokens [r * T, r * T + T]: every token but the very first is a target exactly once. The
                input that precedes another document's first token has weight 0 under data.mask_documents; so a
                document's own end token is a target, and a begin token never is. A document continued from the row
                before starts at position 0 again, since nothing of it can be seen from here.
    crops       row i starts at a random token, with replacement, as nanoGPT draws its batches.
    first_fit,  whole documents share a row (plans.py). Each brings all its targets and nothing that precedes another
    best_fit    document.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from llm_jax.config.schema import DataConfig
from llm_jax.data.plans import Plan, plan_rows, ranges
from llm_jax.data.shuffle import draw, stream_key
from llm_jax.errors import ConfigError, DataError

Rows = dict[str, np.ndarray]


class Tokens(Protocol):
    """What packing needs of a store's split (`store.TokenSplit`)."""

    tokens: np.ndarray  # (n,) unsigned, most often a memmap
    offsets: np.ndarray  # (documents + 1,) int64: document d is tokens[offsets[d]:offsets[d + 1]]
    fingerprint: str


class PackedRows:
    """Rows of one split, by number: `rows[r]` is one, `rows.batch(numbers)` are several at once.

    Picklable: memory-mapped arrays travel as the names of their files.
    """

    in_random_order = False  # whether row numbers already are random draws, so that shuffling them means nothing

    def __init__(self, split: Tokens, length: int, mask_documents: bool, token_bytes: np.ndarray | None = None):
        self.length = length
        self.fill = 1.0  # mean share of a row that is not padding
        self.num_tokens, self.fingerprint = len(split.tokens), split.fingerprint
        self._tokens = np.asarray(split.tokens)  # a plain view: slices of a memmap are slow
        self._offsets = np.asarray(split.offsets)
        self._mask_documents = mask_documents
        self._token_bytes = None if token_bytes is None else np.asarray(token_bytes, np.int32)

    def __len__(self) -> int:
        """Rows of one epoch."""
        raise NotImplementedError

    def batch(self, numbers: np.ndarray) -> Rows:
        """The rows with these numbers: features of shape (len(numbers), T)."""
        raise NotImplementedError

    def __getitem__(self, number: int) -> Rows:
        if not 0 <= number < len(self):
            raise IndexError(f"There is no row {number} among {len(self)}.")
        return {name: array[0] for name, array in self.batch(np.array([number])).items()}

    def padding(self, count: int) -> Rows:
        """`count` rows of nothing but padding."""
        integers = ["tokens", "targets", "segment_ids", "positions"]
        integers += [] if self._token_bytes is None else ["target_bytes"]
        shape = (count, self.length)
        return {name: np.zeros(shape, np.int32) for name in integers} | {"loss_weights": np.zeros(shape, np.float32)}

    def starting_at(self, first: np.ndarray) -> Rows:
        """Rows of inputs tokens[first : first + T] and the token after them, padded where the split ends."""
        window = np.zeros((len(first), self.length + 1), np.int32)
        for row, start in zip(window, first.tolist(), strict=True):
            piece = self._tokens[start : start + self.length + 1]
            row[: len(piece)] = piece
        filled = np.minimum(self.num_tokens - 1 - first, self.length)
        begins = self._document_starts(first)
        return self._features(window[:, :-1], window[:, 1:], filled, begins[:, :-1], ~begins[:, 1:])

    def _document_starts(self, first: np.ndarray) -> np.ndarray:
        """(rows, T + 1) bool: where in tokens[first : first + T + 1] a document begins, but for the first column."""
        begins = np.zeros((len(first), self.length + 1), bool)
        if self._mask_documents:
            low = np.searchsorted(self._offsets, first, "right")
            counts = np.searchsorted(self._offsets, first + self.length, "right") - low
            row = np.repeat(np.arange(len(first)), counts)
            begins[row, self._offsets[ranges(low, counts)] - first[row]] = True
        return begins

    def _features(
        self, tokens: np.ndarray, targets: np.ndarray, filled: np.ndarray, begins: np.ndarray, counted: np.ndarray
    ) -> Rows:
        """Features of rows whose first `filled` (rows,) places are taken. `begins` (rows, T) marks the places where a
        segment starts, apart from the first; `counted` (rows, T) those whose target belongs to the same document."""
        places = np.arange(self.length, dtype=np.int32)
        real = places < filled[:, None]
        weights = (real & counted).astype(np.float32)
        features = {
            "tokens": tokens * real,
            "targets": targets * real,
            "segment_ids": (np.cumsum(begins, axis=1, dtype=np.int32) + 1) * real,
            "positions": (places - np.maximum.accumulate(places * begins, axis=1)) * real,
            "loss_weights": weights,
        }
        if self._token_bytes is not None:
            features["target_bytes"] = self._token_bytes[features["targets"]] * (weights > 0)
        return features

    def __getstate__(self) -> dict[str, Any]:
        return {name: _MappedArray.of(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {n: v.open() if isinstance(v, _MappedArray) else v for n, v in state.items()}


class ConcatRows(PackedRows):
    """All documents in one line, cut every T tokens."""

    def __init__(self, split: Tokens, length: int, mask_documents: bool, token_bytes=None, keep_last: bool = False):
        """`keep_last`: whether an incomplete row at the end is kept, with padding."""
        super().__init__(split, length, mask_documents, token_bytes)
        targets = max(self.num_tokens - 1, 0)
        self._rows = -(-targets // length) if keep_last else targets // length

    def __len__(self) -> int:
        return self._rows

    def batch(self, numbers: np.ndarray) -> Rows:
        return self.starting_at(numbers * self.length)


class CropRows(PackedRows):
    """Row i starts at a token drawn from [0, n - T) by (seed, names, i), for any i >= 0."""

    in_random_order = True

    def __init__(self, split: Tokens, length: int, mask_documents: bool, token_bytes, seed: int, *names: object):
        super().__init__(split, length, mask_documents, token_bytes)
        self._key = stream_key(seed, "crops", *names)

    def __len__(self) -> int:
        return max(self.num_tokens - 1, 0) // self.length

    def batch(self, numbers: np.ndarray) -> Rows:
        return self.starting_at(draw(numbers, self.num_tokens - self.length, self._key))


class PlannedRows(PackedRows):
    """Whole documents, put together as a plan says."""

    def __init__(self, split: Tokens, length: int, plan: Plan, token_bytes=None):
        super().__init__(split, length, True, token_bytes)
        self._starts, self._lengths, self._rows = map(np.asarray, (plan.starts, plan.lengths, plan.rows))
        self.fill = plan.counts["positions"] / (len(self) * length)

    def __len__(self) -> int:
        return len(self._rows) - 1

    def batch(self, numbers: np.ndarray) -> Rows:
        shape = (len(numbers), self.length)
        counts = self._rows[numbers + 1] - self._rows[numbers]
        pieces = ranges(self._rows[numbers], counts)
        row = np.repeat(np.arange(len(numbers)), counts)
        lengths = self._lengths[pieces].astype(np.int64)
        before = np.cumsum(lengths) - lengths  # places filled by all earlier pieces of the batch
        filled = np.bincount(row, lengths, minlength=len(numbers)).astype(np.int64)
        place = before - (np.cumsum(filled) - filled)[row]  # of each piece, in its row

        source = ranges(self._starts[pieces], lengths)
        target_place = ranges(row * self.length + place, lengths)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        tokens.reshape(-1)[target_place] = self._tokens[source]
        targets.reshape(-1)[target_place] = self._tokens[source + 1]
        begins = np.zeros(shape, bool)
        begins[row, place] = place > 0
        return self._features(tokens, targets, filled, begins, np.ones(shape, bool))


def training_rows(
    split: Tokens,
    cfg: DataConfig,
    *,
    name: str,
    folder: str,
    token_bytes: np.ndarray | None,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> PackedRows:
    """The rows that `cfg.packing` makes of a training split.

    Args:
      split: of the store.
      name: of the source, for messages and random draws.
      folder: of the store, where plans are kept.
      token_bytes: (vocabulary,) int32 or None.
      seed: of the crops.
      progress: takes lines of text while a plan is made; None: standard error.

    Raises:
      DataError: there is not one full row.
      ConfigError: documents cannot be kept whole and yet not kept apart.
    """
    length, tokens = cfg.sequence_length, len(split.tokens)
    if cfg.packing in ("first_fit", "best_fit"):
        if not cfg.mask_documents:
            raise ConfigError(
                f"data.mask_documents=False: data.packing={cfg.packing!r} packs documents whole to keep them apart "
                "and has no input that precedes another document; set data.packing='concat', or data.mask_documents "
                "to True."
            )
        plan = plan_rows(folder, name, split, length, cfg.packing, cfg.long_documents, progress)
        return PlannedRows(split, length, plan, token_bytes)
    if tokens < length + 1:
        raise DataError(
            f"The training split of data source {name!r} has {tokens:,} tokens, and one row of "
            f"data.sequence_length={length} needs {length + 1:,}: give more data, or lower data.sequence_length."
        )
    if cfg.packing == "crops":
        return CropRows(split, length, cfg.mask_documents, token_bytes, seed, name)
    return ConcatRows(split, length, cfg.mask_documents, token_bytes)


class _MappedArray:
    """Where a memory-mapped array lies: what is pickled in place of its content."""

    def __init__(self, file: str, dtype: np.dtype, offset: int, shape: tuple[int, ...]):
        self.place = (file, dtype, offset, shape)

    @classmethod
    def of(cls, value: Any) -> Any:
        """`value`, or the place of it if it is a contiguous view of a mapped file."""
        root = value
        while isinstance(root, np.ndarray) and isinstance(root.base, np.ndarray):
            root = root.base
        if not isinstance(root, np.memmap) or not value.flags.c_contiguous:
            return value
        shift = value.ctypes.data - root.ctypes.data
        return cls(str(root.filename), value.dtype, root.offset + shift, value.shape)

    def open(self) -> np.ndarray:
        file, dtype, offset, shape = self.place
        return np.asarray(np.memmap(file, dtype, "r", offset, shape))
