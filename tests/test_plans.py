"""First-fit and best-fit plans: which documents share a row, and the files that keep it."""

import types
from pathlib import Path

import numpy as np
import pytest

from llm_jax.data import plans
from llm_jax.data.plans import best_fit, cut_documents, first_fit, make_plan, plan_rows, ranges
from llm_jax.errors import DataError


def offsets_of(*sizes: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def pieces(plan) -> list[list[tuple[int, int]]]:
    """(first token, positions) of the pieces of each row."""
    borders = plan.rows.tolist()
    flat = list(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    return [flat[low:high] for low, high in zip(borders, borders[1:], strict=False)]


def test_ranges():
    assert ranges(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []


def test_first_fit_takes_the_first_row_with_room():
    assert first_fit(np.array([3, 4, 2, 1, 5, 1]), 5).tolist() == [0, 1, 0, 1, 2, 3]


def test_first_fit_never_goes_back_to_a_closed_row(monkeypatch):
    monkeypatch.setattr(plans, "OPEN_ROWS", 2)
    assert first_fit(np.array([4, 4, 4, 1, 1]), 5).tolist() == [0, 1, 2, 1, 2]


def test_best_fit_puts_the_longest_first_and_into_the_fullest_row():
    assert best_fit(np.array([3, 4, 2, 1, 5, 1]), 5).tolist() == [2, 1, 2, 1, 0, 3]


@pytest.mark.parametrize("pack, at_least", [(first_fit, 0.97), (best_fit, 0.998)])
def test_rows_are_never_overfull_and_mostly_full(pack, at_least):
    sizes = np.clip(np.random.default_rng(0).geometric(1 / 40, 5000), 1, 128)
    row_of = pack(sizes, 128)
    filled = np.bincount(row_of, sizes)
    assert len(row_of) == len(sizes) and filled.min() > 0
    assert filled.max() <= 128 and filled.mean() / 128 > at_least


def test_a_literal_plan():
    plan = make_plan(offsets_of(4, 5, 3, 2), 5, "first_fit", "error")
    assert pieces(plan) == [[(0, 3), (9, 2)], [(4, 4), (12, 1)]]
    assert plan.counts == {"documents": 4, "too_short": 0, "too_long": 0, "positions": 10}


def test_best_fit_rows_follow_the_documents_again():
    plan = make_plan(offsets_of(2, 6, 4), 5, "best_fit", "error")
    assert pieces(plan) == [[(0, 1), (8, 3)], [(2, 5)]]


def test_long_documents_are_split_so_that_each_target_counts_once():
    starts, lengths, counts = cut_documents(offsets_of(3, 12), 5, "split")
    assert starts.tolist() == [0, 3, 8, 13] and lengths.tolist() == [2, 5, 5, 1]
    assert counts == {"documents": 2, "too_short": 0, "too_long": 1}


def test_a_document_of_one_token_more_than_a_row_fits():
    starts, lengths, counts = cut_documents(offsets_of(6), 5, "error")
    assert (starts.tolist(), lengths.tolist(), counts["too_long"]) == ([0], [5], 0)


def test_long_documents_can_be_dropped():
    starts, lengths, counts = cut_documents(offsets_of(3, 12, 4), 5, "drop")
    assert starts.tolist() == [0, 15] and lengths.tolist() == [2, 3] and counts["too_long"] == 1


def test_long_documents_can_be_refused_by_number():
    with pytest.raises(DataError, match=r"Document 1 .* 'books' has 12 tokens, more than the 6 .* as have 1 others"):
        cut_documents(offsets_of(3, 12, 4, 7), 5, "error", "books")


def test_documents_without_a_target_are_left_out():
    starts, lengths, counts = cut_documents(offsets_of(1, 3, 1), 5, "split")
    assert (starts.tolist(), lengths.tolist(), counts["too_short"]) == ([1], [2], 2)


def test_nothing_to_pack():
    with pytest.raises(DataError, match="No document of 3 in .* 1 have fewer than two tokens, 2 more than 6"):
        make_plan(offsets_of(1, 20, 30), 5, "best_fit", "drop")


# --------------------------------------------------------------------------------------------------- files


def open_plan(folder, sizes=(4, 5, 3, 2), fingerprint="f" * 32, lines=None, **changes):
    split = types.SimpleNamespace(offsets=offsets_of(*sizes), fingerprint=fingerprint)
    arguments = {"length": 5, "algorithm": "first_fit", "long_documents": "split"} | changes
    lines = [] if lines is None else lines
    return plan_rows(str(folder), "books", split, **arguments, progress=lines.append)


def plan_folder(folder) -> Path:
    (path,) = (path for path in (folder / "plans").iterdir() if path.is_dir())
    return path


def test_a_plan_is_made_once_and_mapped(tmp_path, monkeypatch):
    first, lines = open_plan(tmp_path), []
    monkeypatch.setattr(plans, "make_plan", None)
    again = open_plan(tmp_path, lines=lines)
    assert pieces(again) == pieces(first) and again.counts == first.counts and not lines
    assert isinstance(again.starts, np.memmap)


def test_making_a_plan_tells_how_full_the_rows_are(tmp_path):
    lines = []
    open_plan(tmp_path, (4, 5, 3, 9, 1), algorithm="best_fit", lines=lines)
    assert lines[0].startswith(
        "books: packed 5 documents into 4 rows of 5, 85.0% full, 1 documents longer than a row split, "
        "1 of a single token left out; kept in "
    )


@pytest.mark.parametrize(
    "change", [{"length": 6}, {"algorithm": "best_fit"}, {"long_documents": "drop"}, {"fingerprint": "e" * 32}]
)
def test_another_question_is_another_plan(tmp_path, change):
    open_plan(tmp_path)
    open_plan(tmp_path, **change)
    assert sum(path.is_dir() for path in (tmp_path / "plans").iterdir()) == 2


def test_an_interrupted_plan_is_made_again(tmp_path):
    first = open_plan(tmp_path)
    folder = plan_folder(tmp_path)
    folder.rename(f"{folder}.partial")
    assert pieces(open_plan(tmp_path)) == pieces(first)


@pytest.mark.parametrize("file", ["starts.npy", "lengths.npy", "rows.npy", "plan.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_plan_is_named(tmp_path, file, damage):
    open_plan(tmp_path)
    path = plan_folder(tmp_path) / file
    content = bytearray(path.read_bytes())
    content[content.index(b'"starts": ') + 10 if file == "plan.json" else -2] ^= 1  # a digit of a checksum, or data
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes({"flip": content, "truncate": content[:-3], "empty": b""}[damage])
    with pytest.raises(DataError, match="delete it, and it is made again"):
        open_plan(tmp_path)


def test_a_plan_of_other_tokens_is_not_taken(tmp_path):
    open_plan(tmp_path, fingerprint="f" * 32)
    path = plan_folder(tmp_path) / "plan.json"
    path.write_text(path.read_text().replace("f" * 32, "f" * 16 + "e" * 16))
    with pytest.raises(DataError, match="is damaged"):
        open_plan(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "plans").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="The packing plan cannot be written to .*data.cache_dir"):
        open_plan(tmp_path)
