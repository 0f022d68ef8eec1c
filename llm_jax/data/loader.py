"""Batches on the devices: the training stream, which can be resumed anywhere at once, and the fixed evaluation set.

Batch k of a training run holds samples [k * B, (k + 1) * B) of the stream (mixture.py), on any number of processes;
each assembles only the rows that its devices need. The state is the number of samples drawn and a fingerprint.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from absl import flags

from llm_jax.config.schema import DataConfig
from llm_jax.data.labelled import texts_a_record
from llm_jax.data.mixture import LocalBatches, Mixture, collect, fingerprint, make_mixture, order_facts, tables_of_bytes
from llm_jax.data.packing import ConcatRows, PackedRows, Rows
from llm_jax.data.shuffle import draw, stream_key
from llm_jax.data.tasks import Stream, TaskBatches, evaluation, make_stream
from llm_jax.errors import ConfigError, DataError, UserError

_GROUP_TOKENS = 2**15  # about as many are assembled at once
_THREADS = 2  # that assemble batches; numpy holds the interpreter's lock most of that time, so more do not help


class BatchLayout(Protocol):
    """What the loader needs of `sharding.Layout`."""

    def batch_rows(self, global_batch_size: int) -> np.ndarray: ...

    def put_batch(self, local: Mapping[str, np.ndarray], global_batch_size: int) -> dict[str, jax.Array]: ...


# ------------------------------------------------------------------------------------------------- training


class TrainLoader:
    """Endless iterator over global batches: dicts of arrays with the features of packing.py or of the task's rows.

    Attributes:
      mixture: the stream, on the host: a `Mixture`, or the `Stream` of another task than language.
      samples: drawn so far, those before a restore included.
      data_wait_seconds: time spent in `next` so far: waiting for a batch and handing it to the devices.
    """

    def __init__(
        self, mixture: Mixture | Stream, facts: dict[str, str], cfg: DataConfig, batch_size: int, layout: BatchLayout
    ):
        self.mixture = mixture
        self.samples = 0
        self.data_wait_seconds = 0.0
        self._facts, self._cfg = facts, cfg
        self._batch_size, self._layout = batch_size, layout
        self._batch_rows = batch_size * getattr(mixture, "rows_a_sample", 1)
        self._places = self._padding = 0
        self._batches: Iterator[Rows] | None = None  # made by the first `next`
        self._closed = False

    @property
    def epoch_rows(self) -> int:
        """Samples in an epoch."""
        return self.mixture.epoch_rows

    @property
    def padding_share(self) -> float:
        """Share of padding in the rows that this process has drawn since it started."""
        return self._padding / max(self._places, 1)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if self._closed:
            raise ValueError("This loader is closed.")
        began = time.perf_counter()
        if self._batches is None:
            self._batches = self._read_ahead()
        try:
            local = next(self._batches)
            if self._cfg.workers:  # the arrays lie in memory that Grain unmaps; JAX may use host memory as it is
                local = {name: np.array(array) for name, array in local.items()}
            batch = self._layout.put_batch(local, self._batch_rows)
        except BaseException:
            self._stop_reading()  # Grain would go on behind the batch that failed, and lose it in silence
            raise
        self.samples += self._batch_size
        self._places += local["segment_ids"].size
        self._padding += local["segment_ids"].size - int(np.count_nonzero(local["segment_ids"]))
        self.data_wait_seconds += time.perf_counter() - began
        return batch

    def state(self) -> dict[str, Any]:
        """What `restore` needs, JSON-able: what was drawn, not what was read ahead."""
        return {"samples": self.samples, "fingerprint": fingerprint(self._facts), "facts": dict(self._facts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind the last batch that was drawn when `state` was taken. Takes the same time at any place.

        Raises:
          UserError: the state is of another stream; the message says what differs.
        """
        samples, facts = state.get("samples"), state.get("facts")
        if type(samples) is not int or samples < 0 or not isinstance(facts, Mapping):
            raise UserError(f"This is no state of a data stream: {dict(state)!r:.300}.")
        if state.get("fingerprint") != fingerprint(self._facts):
            raise UserError(_what_changed(facts, self._facts))
        self._stop_reading()
        self.samples = samples

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._stop_reading()
        self._closed = True

    def _read_ahead(self) -> Iterator[Rows]:
        """This process's rows of each batch; small batches are assembled several at once."""
        groups = self._groups()
        try:
            for group in groups:
                for number in range(len(group["tokens"])):
                    yield {name: array[number] for name, array in group.items()}
        finally:
            groups.close()

    def _groups(self) -> Any:
        cfg, rows = self._cfg, self._layout.batch_rows(self._batch_rows)
        if isinstance(self.mixture, Mixture):
            group = max(min(_GROUP_TOKENS // (len(rows) * cfg.sequence_length), cfg.prefetch // 2), 1)
            source: Any = LocalBatches(self.mixture, self._batch_size, rows, self.samples, group)
        else:
            group, source = 1, TaskBatches(self.mixture, self._batch_size, rows, self.samples)
        # Batches, not rows, are dealt to workers, and Grain puts theirs in turn: so their number changes nothing.
        ahead = -(-cfg.prefetch // (group * max(cfg.workers, 1)))
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
        batches = grain.MapDataset.source(source).to_iter_dataset(options)
        if cfg.workers:
            if not flags.FLAGS.is_parsed():  # Grain has absl flags, and its processes do not start before they are read
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=cfg.workers))
        return iter(batches)

    def _stop_reading(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def make_train(stores: Sequence[Any], cfg: DataConfig, batch_size: int, seed: int, layout: BatchLayout) -> TrainLoader:
    """The training batches of prepared stores (`store.Store`).

    Args:
      stores: one a source of `cfg`, in its order.
      batch_size: rows of a global batch.
      seed: of the run; shuffling and crops derive from it.
      layout: says which rows this process supplies, and makes global arrays of them.

    Raises:
      DataError: there are fewer tokens than one batch holds, or a source has not one row.
    """
    if cfg.task != "language":
        stream = make_stream(stores, cfg, seed)
        if stream.epoch_rows < batch_size:
            raise DataError(
                f"The training data make {stream.epoch_rows:,} rows, fewer than one batch of {batch_size}: lower "
                "train.global_batch_size, or give more data."
            )
        return TrainLoader(stream, stream.facts, cfg, batch_size, layout)
    mixture = make_mixture(stores, cfg, seed)
    tokens = sum(rows.num_tokens for rows in mixture.sources.values())
    needed = batch_size * cfg.sequence_length
    if tokens < needed:
        raise DataError(
            f"The training data has {tokens:,} tokens, fewer than one batch: {batch_size} rows of "
            f"data.sequence_length={cfg.sequence_length} are {needed:,}. Lower train.global_batch_size or "
            "data.sequence_length, or give more data."
        )
    return TrainLoader(mixture, order_facts(mixture, cfg, seed), cfg, batch_size, layout)


def _what_changed(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = [name for name in {**now, **then} if then.get(name) != now.get(name)]
    changes = "; ".join(f"{name} was {then.get(name, 'not there')}, is {now.get(name, 'not there')}" for name in names)
    return (
        f"The data stream is not the one that this run was trained on: {changes or 'its state was altered'}. "
        "Set back what changed, or start another run (checkpoint.init_from takes over the parameters)."
    )


# ----------------------------------------------------------------------------------------------- evaluation


class EvalSet:
    """Validation batches, each a dict of (B, T) arrays; can be iterated any number of times.

    "sequential": the same batches each time, from the start of the validation split, those of a mixture one after
    another. The last batch is filled up with rows of padding, so that shapes never change. "random": random crops, each
    start in all sources equally likely; the n-th iteration draws those of call n, `at(n)` those of any call.
    """

    def __init__(
        self,
        sources: Sequence[ConcatRows],
        batch_size: int,
        batches: int,
        sampling: str,
        seed: int,
        layout: BatchLayout,
    ):
        self._sources, self._batch_size, self._layout = sources, batch_size, layout
        self._random, self._seed = sampling == "random", seed
        # Numbers of rows, or of tokens where a crop can start; those of one source follow those of the one before.
        sizes = [max(rows.num_tokens - rows.length, 0) if self._random else len(rows) for rows in sources]
        self._ends = np.cumsum(sizes)
        self._begins = self._ends - sizes
        all_batches = -(-int(self._ends[-1]) // batch_size)
        self._batches = batches if self._random else min(batches or all_batches, all_batches)
        self._calls = 0
        if not all_batches:
            tokens = " and ".join(f"{rows.num_tokens:,}" for rows in sources)
            needed = sources[0].length + 1 if self._random else 2
            raise DataError(
                f"The validation split has {tokens} tokens, and one row needs {needed:,}: raise "
                "data.validation_fraction, give more data, or lower data.sequence_length."
            )

    def __len__(self) -> int:
        """Batches of one iteration."""
        return self._batches

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        self._calls += 1
        return self.at(self._calls - 1)

    def at(self, call: int) -> Iterator[dict[str, jax.Array]]:
        """The batches of one call: a pure function of its number."""
        local_rows = self._layout.batch_rows(self._batch_size)
        for batch in range(len(self)):
            numbers = batch * self._batch_size + local_rows
            if self._random:
                numbers = draw(numbers, int(self._ends[-1]), stream_key(self._seed, "evaluation", call))
            yield self._layout.put_batch(self._rows(numbers), self._batch_size)

    def _rows(self, numbers: np.ndarray) -> Rows:
        source = np.searchsorted(self._ends, numbers, "right")  # beyond the last number: no source, padding
        stride = 1 if self._random else self._sources[0].length

        def make(rows: PackedRows, mine: np.ndarray) -> Rows:
            return rows.starting_at((numbers[mine] - self._begins[source[mine]]) * stride)

        return collect(self._sources, source, make)


class TaskEvalSet:
    """The validation batches of a task other than language: the same ones at each call."""

    def __init__(
        self, stores: Sequence[Any], cfg: DataConfig, batch_size: int, batches: int, seed: int, layout: BatchLayout
    ):
        self._rows, self._layout = evaluation(stores, cfg, batch_size, batches, seed), layout
        self._batch_rows = batch_size * texts_a_record(cfg)

    def at(self, call: int) -> Iterator[dict[str, jax.Array]]:
        """The batches, whatever the number of the call."""
        for rows in self._rows(self._layout.batch_rows):
            yield self._layout.put_batch(rows, self._batch_rows)


def make_eval(
    stores: Sequence[Any], cfg: DataConfig, batch_size: int, batches: int, sampling: str, seed: int, layout: BatchLayout
) -> EvalSet | TaskEvalSet:
    """The evaluation batches of prepared stores (`store.Store`); always rows in the order of the text (concat).

    Args:
      batches: how many; 0: all of the validation split ("sequential" only). Fewer where it has fewer.
      sampling: "sequential" or "random".
      seed: of random crops.

    Raises:
      DataError: no source has a validation split, or all are too short.
      ConfigError: random sampling without a number of batches.
    """
    if cfg.task != "language":
        return TaskEvalSet(stores, cfg, batch_size, batches, seed, layout)
    if sampling == "random" and not batches:
        raise ConfigError("eval.batches=0: eval.sampling='random' knows no whole set; give the number of batches.")
    held_out = [store for store in stores if "validation" in store.manifest["splits"]]
    if not held_out:
        raise DataError(
            "There is nothing to evaluate on: no data source has a validation split. Set data.validation_fraction "
            "above 0, or data.validation_path (data.mixture.NAME.validation_path of a mixture)."
        )
    sources = [
        ConcatRows(store.split("validation"), cfg.sequence_length, cfg.mask_documents, table, keep_last=True)
        for store, table in zip(held_out, tables_of_bytes(held_out), strict=True)
    ]
    return EvalSet(sources, batch_size, batches, sampling, seed, layout)
