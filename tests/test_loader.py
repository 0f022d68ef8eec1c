"""Batches on the devices: the same for any number of processes and workers, resumable anywhere; a fixed evaluation."""

import contextlib
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import tiny

from llm_jax.config.schema import DataConfig, SourceConfig
from llm_jax.data import loader
from llm_jax.data.mixture import LocalBatches
from llm_jax.data.store import TokenSplit
from llm_jax.errors import ConfigError, DataError, UserError
from llm_jax.sharding import Layout

CFG = DataConfig(sequence_length=16, prefetch=3)


class FakeStore:
    """As `store.Store`; token i of the split is `first` + i, documents have 1 to 20 tokens."""

    def __init__(self, folder, name="data", weight=1.0, first=0, train=2000, validation=300):
        self.name, self.weight, self.folder, self.tokenizer = name, weight, str(folder / name), self
        self.manifest = {"splits": {}}
        self._splits = {}
        for split, count in (("train", train), ("validation", validation)):
            if count is None:
                continue
            path = folder / f"{name}-{split}.bin"
            (first + np.arange(max(count, 1))).astype(np.uint16).tofile(path)
            sizes = np.random.default_rng(first).integers(1, 21, count + 1)
            offsets = np.append(np.cumsum(sizes) - sizes, count)
            tokens = np.memmap(path, np.uint16, "r")[:count]
            offsets = np.unique(np.minimum(offsets, count))
            self.manifest["splits"][split] = {"tokens": count}
            self._splits[split] = TokenSplit(tokens, offsets, f"{name} {split} {count}")

    def split(self, name):
        return self._splits[name]

    def token_bytes(self):
        return np.full(20_000, 3, np.int32)


class OneOfMany:
    """The layout that process `index` of `count` sees; its devices hold every count-th row."""

    def __init__(self, index, count):
        self.index, self.count = index, count

    def batch_rows(self, global_batch_size):
        return np.arange(self.index, global_batch_size, self.count)

    def put_batch(self, local, global_batch_size):
        assert all(len(array) == global_batch_size // self.count for array in local.values())
        return dict(local)


@pytest.fixture
def stores(tmp_path):
    return [FakeStore(tmp_path, "a", 2.0), FakeStore(tmp_path, "b", 1.0, first=5000, train=500)]


MIXED = dataclasses.replace(CFG, mixture={"a": SourceConfig("x"), "b": SourceConfig("y")})


@contextlib.contextmanager
def opened(stores, cfg=MIXED, batch_size=8, seed=0, layout=None):
    with contextlib.closing(loader.make_train(stores, cfg, batch_size, seed, layout or Layout())) as batches:
        yield batches


def take(batches, count):
    return [{name: np.asarray(array) for name, array in batch.items()} for batch in itertools.islice(batches, count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# ------------------------------------------------------------------------------------------------- training


def test_batches_are_the_samples_in_order(stores):
    with opened(stores) as batches:
        first = next(batches)
        assert all(isinstance(array, jax.Array) and array.shape == (8, 16) for array in first.values())
        assert first["tokens"].dtype == np.int32 and first["loss_weights"].dtype == np.float32
        taken = [{n: np.asarray(a) for n, a in first.items()}, *take(batches, 30)]
        assert_same(taken, [batches.mixture.batch(np.arange(k * 8, k * 8 + 8)) for k in range(31)])
        assert batches.epoch_rows == 1999 // 16 + 499 // 16
        assert batches.samples == 31 * 8


@pytest.mark.parametrize("packing", ["concat", "first_fit", "best_fit", "crops"])
def test_every_number_of_processes_gives_the_same_batches(stores, packing):
    cfg = dataclasses.replace(MIXED, packing=packing, mask_documents=packing != "crops")
    with opened(stores, cfg) as batches:
        whole = take(batches, 5)
    for count in (2, 4):
        joined = [{name: np.empty_like(array) for name, array in batch.items()} for batch in whole]
        for index in range(count):
            with opened(stores, cfg, layout=OneOfMany(index, count)) as batches:
                for batch, part in zip(joined, take(batches, 5), strict=True):
                    for name in batch:
                        batch[name][index::count] = part[name]
        assert_same(joined, whole)


def test_batches_are_split_over_the_mesh(stores):
    layout = tiny.mesh_layout(data=2, fsdp=2)
    with opened(stores) as plain, opened(stores, layout=layout) as split:
        batch = next(split)
        assert len(batch["tokens"].sharding.device_set) == 4
        assert batch["tokens"].addressable_shards[0].data.shape == (2, 16)
        assert_same(take(iter([batch]), 1), take(plain, 1))


def test_restoring_goes_on_behind_the_last_batch_drawn(stores):
    """At any point, also behind several epochs of the smaller source, and with batches read ahead."""
    with opened(stores) as batches:
        states, taken = [], []
        for _ in range(60):
            states.append(json.loads(json.dumps(batches.state())))
            taken += take(batches, 1)
    with opened(stores) as batches:
        for start in (0, 1, 17, 59, 2):
            batches.restore(states[start])
            assert batches.samples == start * 8 == batches.state()["samples"]
            assert_same(take(batches, 60 - start), taken[start:])


def test_restoring_takes_as_long_at_any_place(stores):
    with opened(stores) as batches:
        far = batches.state() | {"samples": 8 * 10**12}
        batches.restore(far)
        assert_same(take(batches, 1), [batches.mixture.batch(8 * 10**12 + np.arange(8))])


def test_another_batch_size_goes_on_at_the_same_sample(stores):
    with opened(stores) as batches:
        take(batches, 3)
        state = batches.state()
    with opened(stores, batch_size=12) as batches:
        batches.restore(state)
        assert_same(take(batches, 1), [batches.mixture.batch(np.arange(24, 36))])


def test_every_row_comes_once_an_epoch(stores):
    with opened(stores[:1], CFG, batch_size=4) as batches:
        rows = batches.epoch_rows  # 124: whole batches
        for _ in range(3):
            tokens = np.concatenate([batch["tokens"] for batch in take(batches, rows // 4)])
            assert sorted(tokens.ravel().tolist()) == list(range(rows * 16))


def test_worker_processes_change_nothing(stores):
    cfg = dataclasses.replace(MIXED, packing="first_fit")
    with opened(stores, cfg) as batches:
        expected = take(batches, 9)
    with opened(stores, dataclasses.replace(cfg, workers=2)) as batches:
        batches.restore(batches.state() | {"samples": 16})
        assert_same(take(batches, 7), expected[2:])
        assert batches.state()["samples"] == 72


def test_a_small_split_repeats_within_a_batch(tmp_path):
    store = FakeStore(tmp_path, train=129)  # 8 rows
    with opened([store], CFG, batch_size=8) as batches:
        for batch in take(batches, 3):
            assert sorted(batch["tokens"].ravel().tolist()) == list(range(128))
    store = FakeStore(tmp_path, train=128)  # 7 rows, and as many tokens as a batch
    with opened([store], CFG, batch_size=8) as batches:
        assert len(take(batches, 3)[2]["tokens"]) == 8


def test_fewer_tokens_than_a_batch(tmp_path):
    store = FakeStore(tmp_path, train=127)
    message = (
        r"127 tokens, fewer than one batch: 8 rows of data.sequence_length=16 are 128. Lower train.global_batch_size"
    )
    with pytest.raises(DataError, match=message):
        loader.make_train([store], CFG, 8, 0, Layout())


def test_waiting_and_padding_are_counted(stores, monkeypatch):
    with opened(stores, dataclasses.replace(MIXED, packing="first_fit"), layout=OneOfMany(1, 2)) as batches:
        assert batches.data_wait_seconds == batches.padding_share == 0
        taken = take(batches, 10)
        padding = np.mean([batch["segment_ids"] == 0 for batch in taken])
        assert 0 < batches.padding_share == pytest.approx(padding)
        clock = iter([10.0, 12.5])
        monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
        before = batches.data_wait_seconds
        take(batches, 1)
        assert batches.data_wait_seconds - before == pytest.approx(2.5)


def test_a_batch_that_failed_is_not_skipped(stores, monkeypatch):
    """Grain itself goes on behind a record that raised."""
    read, failed = LocalBatches.__getitem__, []

    def read_with_a_fault(self, number):
        if self._start + number * 8 == 16 and not failed:  # 3 batches are read ahead, so one at a time
            failed.append(number)
            raise OSError("the disk is gone")
        return read(self, number)

    monkeypatch.setattr(LocalBatches, "__getitem__", read_with_a_fault)
    with opened(stores) as batches:
        first = take(batches, 2)
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
        assert batches.samples == 16
        assert_same(first + take(batches, 1), [batches.mixture.batch(np.arange(k, k + 8)) for k in (0, 8, 16)])


def test_a_closed_loader_gives_nothing(stores):
    with opened(stores) as batches:
        take(batches, 1)
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


# ------------------------------------------------------------------------------------------------ refused states


def test_a_state_of_another_stream_is_refused_by_name(stores, tmp_path):
    with opened(stores) as batches:
        take(batches, 2)
        state = batches.state()
    other = FakeStore(tmp_path / "..", "b", 1.0, first=5000, train=600)
    for changed_stores, changes, seed, message in (
        (stores, {}, 7, "seed was 0, is 7"),
        (stores, {"sequence_length": 8}, 0, "data.sequence_length was 16, is 8"),
        (
            stores,
            {"packing": "first_fit"},
            0,
            "data.packing was concat, is first_fit; data.long_documents was not there",
        ),
        (
            stores,
            {"mixture_temperature": 2.0},
            0,
            "share of source a was 0.666666667, is 0.585786438; share of source b",
        ),
        ([stores[0], other], {}, 0, "tokens of source b was b train 500, is b train 600"),
        (stores[:1], {}, 0, "sources was a, b, is a; .* tokens of source b was b train 500, is not there"),
    ):
        with (
            opened(changed_stores, dataclasses.replace(MIXED, **changes), seed=seed) as batches,
            pytest.raises(UserError, match=message),
        ):
            batches.restore(state)


@pytest.mark.parametrize("change", [{"samples": -1}, {"samples": 2.0}, {"samples": True}, {"facts": None}])
def test_what_is_no_state_is_refused(stores, change):
    with opened(stores) as batches, pytest.raises(UserError, match="no state of a data stream"):
        batches.restore(batches.state() | change)


def test_an_altered_state_is_refused(stores):
    with opened(stores) as batches, pytest.raises(UserError, match="its state was altered"):
        batches.restore(batches.state() | {"fingerprint": "0" * 32})


# ------------------------------------------------------------------------------------------------------ evaluation


def make_eval(stores, batch_size=4, batches=0, sampling="sequential", cfg=CFG, layout=None, seed=0):
    return loader.make_eval(stores, cfg, batch_size, batches, sampling, seed, layout or Layout())


def test_the_whole_validation_split_in_order_with_padding_at_the_end(stores):
    held_out = make_eval(stores[:1])  # 300 tokens: 18 rows and one of 11 targets
    taken = take(held_out, 100)
    assert len(held_out) == len(taken) == 5
    assert all(batch["tokens"].shape == (4, 16) for batch in taken)
    tokens, segments, weights = (
        np.concatenate([batch[name] for batch in taken]) for name in ("tokens", "segment_ids", "loss_weights")
    )
    assert tokens[:18].ravel().tolist() == list(range(288))
    assert tokens[18].tolist() == list(range(288, 299)) + [0] * 5
    assert (segments > 0).sum() == 299 and not segments[19].any() and not weights[19].any()
    documents = len(stores[0].split("validation").offsets) - 1
    assert weights.sum() == 300 - documents
    assert sum(batch["target_bytes"].sum() for batch in taken) == 3 * weights.sum()
    assert_same(take(held_out, 100), taken)


def test_the_splits_of_a_mixture_one_after_another(stores):
    taken = take(make_eval(stores), 100)
    alone = [np.concatenate([b["tokens"] for b in take(make_eval([store]), 100)])[:19] for store in stores]
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in taken])[:38], np.concatenate(alone))
    assert len(taken) == 10


def test_a_number_of_batches_from_the_start(stores):
    assert_same(take(make_eval(stores, batches=2), 100), take(make_eval(stores), 2))
    assert len(make_eval(stores, batches=1000)) == 10


@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_evaluation_on_many_processes(stores, sampling):
    whole = take(make_eval(stores, batch_size=16, batches=3, sampling=sampling), 100)
    for index in range(4):
        part = make_eval(stores, batch_size=16, batches=3, sampling=sampling, layout=OneOfMany(index, 4))
        assert_same(list(part), [{name: array[index::4] for name, array in batch.items()} for batch in whole])


def test_random_crops_are_fresh_at_every_call(stores):
    cfg = dataclasses.replace(CFG, mask_documents=False)
    held_out = make_eval(stores, batches=3, sampling="random", cfg=cfg)
    first, second = take(held_out, 100), take(held_out, 100)
    assert len(held_out) == len(first) == len(second) == 3
    assert not any((one["tokens"] == other["tokens"]).all() for one, other in zip(first, second, strict=True))
    assert_same(take(held_out.at(1), 100), second)
    assert_same(take(make_eval(stores, batches=3, sampling="random", cfg=cfg), 100), first)
    with pytest.raises(AssertionError):
        assert_same(take(make_eval(stores, batches=3, sampling="random", cfg=cfg, seed=1), 100), first)


def test_random_crops_start_anywhere_in_all_sources(stores):
    cfg = dataclasses.replace(CFG, mask_documents=False)
    (batch,) = make_eval(stores, batch_size=4000, batches=1, sampling="random", cfg=cfg)
    first = np.asarray(batch["tokens"])[:, 0]
    assert set(first.tolist()) <= {*range(284), *range(5000, 5284)} and len(set(first.tolist())) > 560
    assert (np.asarray(batch["targets"]) == np.asarray(batch["tokens"]) + 1).all()
    assert abs((first < 5000).mean() - 0.5) < 0.05


def test_sources_without_a_validation_split_are_left_out(stores, tmp_path):
    bare = FakeStore(tmp_path, "c", validation=None)
    assert_same(take(make_eval([bare, *stores]), 100), take(make_eval(stores), 100))
    with pytest.raises(DataError, match="no data source has a validation split. Set data.validation_fraction above 0"):
        make_eval([bare])


def test_a_validation_split_without_a_row(tmp_path):
    short = FakeStore(tmp_path, validation=16)
    assert len(make_eval([short])) == 1
    with pytest.raises(DataError, match="The validation split has 16 tokens, and one row needs 17"):
        make_eval([short], sampling="random", batches=1)
    with pytest.raises(DataError, match="has 1 tokens, and one row needs 2"):
        make_eval([FakeStore(tmp_path, validation=1)])


def test_random_sampling_needs_a_number_of_batches(stores):
    with pytest.raises(ConfigError, match="eval.batches=0"):
        make_eval(stores, sampling="random")
