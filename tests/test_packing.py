"""Rows: every packing rule as literal arrays, and what must hold for any documents."""

import dataclasses
import pickle

import numpy as np
import pytest

from llm_jax.config.schema import DataConfig
from llm_jax.data.packing import ConcatRows, CropRows, PlannedRows, training_rows
from llm_jax.data.plans import make_plan
from llm_jax.data.store import TokenSplit
from llm_jax.errors import ConfigError, DataError

FEATURES = {"tokens", "targets", "segment_ids", "positions", "loss_weights"}


def split_of(*documents) -> TokenSplit:
    tokens = np.concatenate([np.asarray(document, np.uint16) for document in documents])
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    return TokenSplit(tokens, offsets, "f" * 32)


def random_split(documents: int = 60, longest: int = 30, seed: int = 0) -> TokenSplit:
    """Documents of 1 to `longest` tokens; no token occurs twice, so that each tells where it comes from."""
    sizes = np.random.default_rng(seed).integers(1, longest + 1, documents)
    return split_of(*np.split(np.arange(100, 100 + sizes.sum()), np.cumsum(sizes)[:-1]))


def planned(split: TokenSplit, length: int, algorithm: str = "first_fit", long_documents: str = "split", **more):
    return PlannedRows(split, length, make_plan(split.offsets, length, algorithm, long_documents), **more)


def assert_row(row, **expected):
    assert {name: row[name].tolist() for name in expected} == expected


# ---------------------------------------------------------------------------------------------- literal rows

THREE = split_of([10, 11, 12], [20, 21], [30, 31, 32, 33, 34])  # with 12, 21, 34 as end tokens, say


def test_concat_with_documents_kept_apart():
    rows = ConcatRows(THREE, 4, mask_documents=True)
    assert len(rows) == 2
    assert_row(
        rows[0],
        tokens=[10, 11, 12, 20],
        targets=[11, 12, 20, 21],
        segment_ids=[1, 1, 1, 2],
        positions=[0, 1, 2, 0],
        loss_weights=[1, 1, 0, 1],
    )
    assert_row(  # the document of 20 goes on from the row before: again at position 0
        rows[1],
        tokens=[21, 30, 31, 32],
        targets=[30, 31, 32, 33],
        segment_ids=[1, 2, 2, 2],
        positions=[0, 0, 1, 2],
        loss_weights=[0, 1, 1, 1],
    )


def test_concat_as_one_stream():
    rows = ConcatRows(THREE, 4, mask_documents=False)
    assert_row(
        rows[1],
        tokens=[21, 30, 31, 32],
        targets=[30, 31, 32, 33],
        segment_ids=[1, 1, 1, 1],
        positions=[0, 1, 2, 3],
        loss_weights=[1, 1, 1, 1],
    )


def test_the_incomplete_last_row_can_be_kept():
    assert len(ConcatRows(THREE, 4, True)) == 2
    rows = ConcatRows(THREE, 4, True, np.full(40, 2), keep_last=True)
    assert len(rows) == 3
    assert_row(
        rows[2],
        tokens=[33, 0, 0, 0],
        targets=[34, 0, 0, 0],
        segment_ids=[1, 0, 0, 0],
        positions=[0, 0, 0, 0],
        loss_weights=[1, 0, 0, 0],
        target_bytes=[2, 0, 0, 0],
    )


def test_an_exact_fit_has_no_incomplete_row():
    assert len(ConcatRows(split_of(range(9)), 4, True, keep_last=True)) == 2
    assert len(ConcatRows(split_of(range(10)), 4, True, keep_last=True)) == 3
    assert len(ConcatRows(split_of([1]), 4, True, keep_last=True)) == 0  # nothing to predict


def test_a_border_between_rows_hides_the_next_document():
    rows = ConcatRows(split_of([1, 2, 3, 4], [5, 6, 7, 8, 9]), 4, True)
    assert_row(rows[0], targets=[2, 3, 4, 5], segment_ids=[1, 1, 1, 1], loss_weights=[1, 1, 1, 0])
    assert_row(rows[1], tokens=[5, 6, 7, 8], segment_ids=[1, 1, 1, 1], loss_weights=[1, 1, 1, 1])


def test_documents_of_one_token():
    rows = ConcatRows(split_of([1], [2], [3, 4, 5]), 4, True)
    assert_row(rows[0], segment_ids=[1, 2, 3, 3], positions=[0, 0, 0, 1], loss_weights=[0, 0, 1, 1])


def test_bytes_are_counted_where_targets_count():
    table = np.zeros(40, np.int32)
    table[[11, 12, 20, 21]] = 1, 0, 5, 3  # 12: an end token
    rows = ConcatRows(THREE, 4, True, table)
    assert_row(rows[0], target_bytes=[1, 0, 0, 3])
    assert_row(ConcatRows(THREE, 4, False, table)[0], target_bytes=[1, 0, 5, 3])


def test_whole_documents_share_rows():
    split = split_of([10, 11, 12], [20, 21, 22, 23], [30, 31, 32], [40, 41])
    rows = planned(split, 5, token_bytes=np.full(50, 2))
    assert len(rows) == 2 and rows.fill == pytest.approx(0.8)
    assert_row(
        rows[0],
        tokens=[10, 11, 20, 21, 22],
        targets=[11, 12, 21, 22, 23],
        segment_ids=[1, 1, 2, 2, 2],
        positions=[0, 1, 0, 1, 2],
        loss_weights=[1, 1, 1, 1, 1],
        target_bytes=[2, 2, 2, 2, 2],
    )
    assert_row(
        rows[1],
        tokens=[30, 31, 40, 0, 0],
        targets=[31, 32, 41, 0, 0],
        segment_ids=[1, 1, 2, 0, 0],
        positions=[0, 1, 0, 0, 0],
        loss_weights=[1, 1, 1, 0, 0],
        target_bytes=[2, 2, 2, 0, 0],
    )


def test_a_split_document_goes_on_in_the_next_row():
    rows = planned(split_of(range(10, 18)), 4)
    assert_row(rows[0], tokens=[10, 11, 12, 13], targets=[11, 12, 13, 14])
    assert_row(
        rows[1], tokens=[14, 15, 16, 0], targets=[15, 16, 17, 0], positions=[0, 1, 2, 0], segment_ids=[1, 1, 1, 0]
    )


# --------------------------------------------------------------------------------------------- what must hold


def all_rows(rows):
    return rows.batch(np.arange(len(rows)))


def makers():
    yield "concat", lambda split: ConcatRows(split, 16, True, keep_last=True)
    for algorithm in ("first_fit", "best_fit"):
        yield algorithm, lambda split, a=algorithm: planned(split, 16, a)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in makers()])
@pytest.mark.parametrize("seed", range(3))
class TestInvariants:
    def test_every_target_counts_once(self, make, seed):
        split = random_split(seed=seed)
        batch = all_rows(make(split))
        counted = batch["targets"][batch["loss_weights"] > 0]
        first_of_document = split.tokens[split.offsets[:-1]]
        assert sorted(counted.tolist()) == sorted(set(split.tokens.tolist()) - set(first_of_document.tolist()))

    def test_no_segment_has_two_documents_and_none_is_torn_within_a_row(self, make, seed):
        split = random_split(seed=seed)
        batch = all_rows(make(split))
        document = np.searchsorted(split.offsets, np.arange(len(split.tokens)), "right")
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            used = segments[segments > 0]
            assert (used == np.sort(used)).all() and set(used.tolist()) == set(range(1, used.max() + 1))
            owners = [set(document[tokens[segments == s] - 100].tolist()) for s in range(1, used.max() + 1)]
            assert all(len(owner) == 1 for owner in owners)
            assert len(set.union(*owners)) == len(owners)
            assert (segments[len(used) :] == 0).all()  # padding comes last

    def test_positions_restart_in_every_segment(self, make, seed):
        batch = all_rows(make(random_split(seed=seed)))
        for positions, segments in zip(batch["positions"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                assert positions[segments == segment].tolist() == list(range((segments == segment).sum()))

    def test_a_counted_target_is_the_next_token_of_the_document(self, make, seed):
        batch = all_rows(make(random_split(seed=seed)))
        real = batch["loss_weights"] > 0
        np.testing.assert_array_equal(batch["targets"][real], batch["tokens"][real] + 1)  # tokens are numbered
        inside = real[:, :-1] & (np.diff(batch["segment_ids"], axis=1) == 0)
        np.testing.assert_array_equal(batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside])

    def test_padding_is_zero_everywhere(self, make, seed):
        batch = all_rows(make(random_split(seed=seed)))
        padding = batch["segment_ids"] == 0
        assert padding.any()
        assert not any(array[padding].any() for array in batch.values())

    def test_dtypes_and_shapes(self, make, seed):
        rows = make(random_split(seed=seed))
        batch = rows.batch(np.array([2, 0]))
        assert batch.keys() == FEATURES
        for name, array in batch.items():
            assert array.shape == (2, 16) and array.dtype == (np.float32 if name == "loss_weights" else np.int32), name
        for name, array in rows[2].items():
            np.testing.assert_array_equal(array, batch[name][0])
        nothing = rows.padding(2)
        assert {n: (a.shape, a.dtype, a.any()) for n, a in nothing.items()} == {
            n: (a.shape, a.dtype, False) for n, a in batch.items()
        }


@pytest.mark.parametrize("algorithm", ["first_fit", "best_fit"])
def test_whole_documents_come_back(algorithm):
    split = random_split(longest=17)
    batch = all_rows(planned(split, 16, algorithm, "error"))
    found = []
    for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            found.append([*tokens[segments == segment].tolist(), int(targets[segments == segment][-1])])
    documents = [d.tolist() for d in np.split(split.tokens, split.offsets[1:-1]) if len(d) > 1]
    assert sorted(found) == sorted(documents)


def test_rows_beyond_the_last_do_not_exist():
    rows = ConcatRows(THREE, 4, True)
    for number in (2, -1):
        with pytest.raises(IndexError, match="among 2"):
            rows[number]


# ------------------------------------------------------------------------------------------------------ crops


def test_crops_start_anywhere_with_equal_chance():
    rows = CropRows(split_of(range(100, 120)), 4, False, None, 0, "a")
    batch = rows.batch(np.arange(16_000))
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    np.testing.assert_array_equal(batch["tokens"], batch["tokens"][:, :1] + np.arange(4))
    starts = np.bincount(batch["tokens"][:, 0] - 100)
    assert len(starts) == 16  # [0, n - T)
    assert ((starts - 1000) ** 2 / 1000).sum() < 15 + 4 * np.sqrt(30)
    assert (batch["segment_ids"] == 1).all() and (batch["loss_weights"] == 1).all()
    assert (batch["positions"] == np.arange(4)).all()


def test_crops_depend_on_seed_source_and_number_alone():
    split = random_split()
    draws = [CropRows(split, 4, False, None, seed, name) for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    first, same, other_seed, other_name = (rows.batch(np.arange(50))["tokens"] for rows in draws)
    np.testing.assert_array_equal(first, same)
    assert (first != other_seed).any() and (first != other_name).any()
    np.testing.assert_array_equal(draws[0].batch(np.array([10**12, 7]))["tokens"][1], first[7])


# --------------------------------------------------------------------------------------------- from the config


def rows_of(cfg: DataConfig, split: TokenSplit = THREE, folder: str = "", **more):
    more = {"name": "books", "folder": folder, "token_bytes": None, "seed": 0, "progress": lambda line: None} | more
    return training_rows(split, cfg, **more)


@pytest.mark.parametrize("packing", ["concat", "first_fit", "best_fit", "crops"])
def test_packings_by_name(packing, tmp_path):
    cfg = DataConfig(packing=packing, sequence_length=5, mask_documents=packing != "crops")
    rows = rows_of(cfg, random_split(), str(tmp_path), token_bytes=np.full(2000, 1))
    batch = rows.batch(np.arange(min(len(rows), 8)))
    assert batch.keys() == FEATURES | {"target_bytes"}
    assert (tmp_path / "plans").exists() == packing.endswith("fit")


@pytest.mark.parametrize("packing", ["concat", "crops"])
def test_too_few_tokens_for_a_row(packing):
    assert len(rows_of(DataConfig(packing=packing, sequence_length=9))) == 1
    message = "'books' has 10 tokens, and one row of data.sequence_length=10 needs 11"
    with pytest.raises(DataError, match=message):
        rows_of(DataConfig(packing=packing, sequence_length=10))


def test_long_documents_follow_the_config(tmp_path):
    cfg = DataConfig(packing="best_fit", sequence_length=3, long_documents="error")
    with pytest.raises(DataError, match="Document 2 .* has 5 tokens"):
        rows_of(cfg, folder=str(tmp_path))
    assert len(rows_of(dataclasses.replace(cfg, long_documents="split"), folder=str(tmp_path))) == 3
    assert len(rows_of(dataclasses.replace(cfg, long_documents="drop"), folder=str(tmp_path))) == 1


def test_whole_documents_are_always_kept_apart():
    with pytest.raises(ConfigError, match="data.mask_documents=False: data.packing='best_fit'"):
        rows_of(DataConfig(packing="best_fit", mask_documents=False))


# ---------------------------------------------------------------------------------------------------- pickling


@pytest.mark.parametrize("part", [slice(None), slice(3, None), slice(7, 5000)])
def test_mapped_tokens_are_pickled_by_name(tmp_path, part):
    np.arange(20_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, "r", offset=4)[part]
    split = TokenSplit(tokens, np.array([0, 50, len(tokens)]), "f")
    rows = ConcatRows(split, 16, True)
    pickled = pickle.dumps(rows)
    assert len(pickled) < 2000
    for name, array in pickle.loads(pickled).batch(np.arange(20)).items():
        np.testing.assert_array_equal(array, rows.batch(np.arange(20))[name])


def test_plans_are_pickled_by_name(tmp_path):
    split = random_split(2000)
    split.tokens.tofile(tmp_path / "tokens.bin")
    split = dataclasses.replace(split, tokens=np.memmap(tmp_path / "tokens.bin", np.uint16, "r"))
    rows = rows_of(DataConfig(packing="first_fit", sequence_length=16), split, str(tmp_path))
    pickled = pickle.dumps(rows)
    assert len(pickled) < split.offsets.nbytes + 2000
    for name, array in all_rows(pickle.loads(pickled)).items():
        np.testing.assert_array_equal(array, all_rows(rows)[name])
