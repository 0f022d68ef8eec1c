"""The training stream: rows of one or several sources in one endless order, where any row can be computed at once.

Which row sample i is follows from i by arithmetic: the shares of the sources say from which source it comes and as the
how-manieth, the length of that source in which epoch, and a permutation of that epoch which row. So the stream has no
state, and the order does not depend on batch size, processes, workers or what was read before.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_jax.config.schema import DataConfig
from llm_jax.data.packing import PackedRows, Rows, training_rows
from llm_jax.data.shuffle import permute, stream_key

ORDER_VERSION = 1  # of the arithmetic here, in shuffle and in packing; another gives another stream
SHARE_UNITS = 2**31  # shares are whole numbers of this, so that int64 arithmetic is exact for any sample
BLOCK = 1024  # rows


class Mixture:
    """`mixture.batch(samples)` are the rows with these numbers of the stream, any number from 0 on."""

    def __init__(
        self,
        sources: dict[str, PackedRows],
        weights: Sequence[float],
        *,
        temperature: float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """Weights are shares of tokens, relative to each other, raised to the power 1/temperature before they are used
        (T5, arXiv 1910.10683, section 3.5.2)."""
        self.sources = sources
        powers = np.asarray(weights, np.float64) ** (1 / temperature)
        self.token_shares = dict(zip(sources, (powers / powers.sum()).tolist(), strict=True))
        # A source whose rows are half padding gives half the tokens a row, and so needs twice the rows.
        row_weights = [share / sources[name].fill for name, share in self.token_shares.items()]
        self._units = whole_shares(row_weights)
        self._seed, self._shuffle = seed, shuffle

    @property
    def epoch_rows(self) -> int:
        """Samples in an epoch: as many rows as all sources have together (of which a mixture repeats some sooner)."""
        return sum(len(rows) for rows in self.sources.values())

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where samples come from.

        Args:
          samples: (n,) int64 numbers in the stream.

        Returns:
          source, epoch, row: (n,) int64 each: index into `sources`, passes over that source before, row of its
          `PackedRows`.
        """
        source, number = interleave(samples, self._units)
        epoch, row = np.zeros_like(number), np.zeros_like(number)
        for index, (name, rows) in enumerate(self.sources.items()):
            mine = np.flatnonzero(source == index)
            epoch[mine], row[mine] = np.divmod(number[mine], len(rows))
            if rows.in_random_order:
                row[mine] = number[mine]
            elif self._shuffle:
                row[mine] = self._shuffled(name, epoch[mine], row[mine])
        return source, epoch, row

    def _shuffled(self, name: str, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        rows, blocks = np.empty_like(places), places // BLOCK
        for epoch, block in set(zip(epochs.tolist(), blocks.tolist(), strict=True)):
            here = (epochs == epoch) & (blocks == block)
            rows[here] = shuffled_block(self._seed, name, len(self.sources[name]), epoch, block)[places[here] % BLOCK]
        return rows

    def batch(self, samples: np.ndarray) -> Rows:
        """The rows of these samples, in order: features of shape (len(samples), T)."""
        source, _, row = self.locate(samples)
        return collect(list(self.sources.values()), source, lambda rows, mine: rows.batch(row[mine]))

    def __getitem__(self, sample: int) -> Rows:
        return {name: array[0] for name, array in self.batch(np.array([sample])).items()}


@functools.lru_cache(maxsize=256)
def shuffled_block(seed: int, name: str, size: int, epoch: int, block: int) -> np.ndarray:
    """Rows at `BLOCK` neighbouring places of one epoch's order of a source: as quick to make as a few, and kept."""
    places = np.arange(block * BLOCK, min((block + 1) * BLOCK, size))
    return permute(places, size, stream_key(seed, "shuffle", name, epoch))


class LocalBatches:
    """This process's rows of the batches from sample `start` on, as a random-access source for Grain (which pickles it
    for its workers; it stands here so that they need not import JAX).

    An element holds `group` batches in a row, features of shape (group, rows, T): small batches cost numpy as much to
    make one by one as many at once.
    """

    def __init__(self, mixture: Mixture, batch_size: int, local_rows: np.ndarray, start: int, group: int):
        self._mixture, self._start = mixture, start
        self._samples = (np.arange(group)[:, None] * batch_size + local_rows).reshape(-1)  # of the first element
        self._group, self._stride = group, group * batch_size

    def __len__(self) -> int:
        return 2**62 // self._stride  # endless

    def __getitem__(self, number: int) -> Rows:
        rows = self._mixture.batch(self._start + number * self._stride + self._samples)
        return {name: array.reshape(self._group, -1, *array.shape[1:]) for name, array in rows.items()}

    def __repr__(self) -> str:
        return f"LocalBatches(start={self._start})"


def collect(sources: Sequence[PackedRows], source: np.ndarray, make: Callable[[PackedRows, np.ndarray], Rows]) -> Rows:
    """One batch of rows from several sources.

    Args:
      sources: with the same features.
      source: (n,) int64, of each row; a number beyond the last source makes a row of padding.
      make: gives the rows at some places, (m,) int64, of the batch, all from one source.
    """
    features = sources[0].padding(len(source))
    for index, rows in enumerate(sources):
        mine = np.flatnonzero(source == index)
        for name, array in make(rows, mine).items() if mine.size else ():
            features[name][mine] = array
    return features


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to the weights, each at least 1, that add up to `SHARE_UNITS`."""
    exact = np.asarray(weights, np.float64)
    units = np.maximum(np.round(exact / exact.sum() * SHARE_UNITS).astype(np.int64), 1)
    units[units.argmax()] += SHARE_UNITS - units.sum()
    return tuple(units.tolist())


def interleave(samples: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Deals an endless row of samples out to sources, evenly: among the first k samples source j has its share of k to
    within one a source before it, for every k.

    Args:
      samples: (n,) int64, not negative.
      shares: whole numbers; their sum at most 2**31.

    Returns:
      source (n,) int64, and number (n,) int64: how many of the samples before went to the same source.
    """
    source, number = np.zeros_like(samples), np.zeros_like(samples)
    before, after = (
        samples,
        samples + 1,
    )  # how many of the samples up to here, or this one too, are still to be dealt out
    remaining = sum(shares)
    for index, share in enumerate(shares):
        left_before, left_after = (_floor_of_share(count, remaining - share, remaining) for count in (before, after))
        mine = after - left_after > before - left_before
        source[mine], number[mine] = index, (before - left_before)[mine]
        before, after, remaining = left_before, left_after, remaining - share
    return source, number


def _floor_of_share(counts: np.ndarray, part: int, whole: int) -> np.ndarray:
    """floor(counts * part / whole), without the product's overflow."""
    times, rest = np.divmod(counts, whole)
    return times * part + rest * part // whole


def make_mixture(
    stores: Sequence[Any], cfg: DataConfig, seed: int, progress: Callable[[str], None] | None = None
) -> Mixture:
    """The training stream of prepared stores (`store.Store`), one a source.

    Raises:
      DataError, ConfigError: see `training_rows`.
    """
    tables = tables_of_bytes(stores)
    sources = {
        store.name: training_rows(
            store.split("train"),
            cfg,
            name=store.name,
            folder=store.folder,
            token_bytes=table,
            seed=seed,
            progress=progress,
        )
        for store, table in zip(stores, tables, strict=True)
    }
    weights = [store.weight for store in stores]
    return Mixture(sources, weights, temperature=cfg.mixture_temperature, seed=seed, shuffle=cfg.shuffle)


def tables_of_bytes(stores: Sequence[Any]) -> list[np.ndarray | None]:
    """Each store's bytes a token; None for all if one lacks them, since all rows of a batch have the same features."""
    tables = [store.tokenizer.token_bytes() for store in stores]
    return tables if all(table is not None for table in tables) else [None] * len(tables)


def order_facts(mixture: Mixture, cfg: DataConfig, seed: int) -> dict[str, str]:
    """All that the stream's rows and their order depend on: names that users know, with values as short strings."""
    facts = {
        "order version": str(ORDER_VERSION),
        "seed": str(seed),
        "data.sequence_length": str(cfg.sequence_length),
        "data.packing": cfg.packing,
        "data.mask_documents": str(cfg.mask_documents),
        "data.shuffle": str(cfg.shuffle),
        "sources": ", ".join(mixture.sources),
    }
    if cfg.packing in ("first_fit", "best_fit"):
        facts["data.long_documents"] = cfg.long_documents
    for name, rows in mixture.sources.items():
        facts[f"tokens of source {name}"] = rows.fingerprint
        facts[f"share of source {name}"] = f"{mixture.token_shares[name]:.9g}"
    return facts


def fingerprint(facts: dict[str, str]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
