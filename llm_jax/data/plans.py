"""Which documents share a row under first-fit and best-fit packing: worked out once, kept beside the store's tokens.

    <store>/plans/<name>/plan.json         what it is a plan of, counts, checksums
    <store>/plans/<name>/starts.npy        int64: first token of each piece, row by row
    <store>/plans/<name>/lengths.npy       int32: positions that each piece fills
    <store>/plans/<name>/rows.npy          int64: first piece of each row, then the number of pieces

A piece is a document or, of one that is too long for a row, a part. A document of L tokens fills L - 1 positions: each
token but the first is a target, each but the last an input. A plan appears by a rename, so there is never half a one.
"""

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.data.locks import locked
from llm_jax.data.progress import Progress
from llm_jax.data.shards import sync_file, sync_folder
from llm_jax.errors import DataError

VERSION = 1  # of the files and of the algorithms; a new one makes new plans
OPEN_ROWS = 1024  # that first-fit looks at; older ones are closed
_ARRAYS = ("starts", "lengths", "rows")
_CHUNK = 1 << 16  # pieces between signs of life


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Row r has the pieces rows[r] to rows[r + 1]; piece p fills lengths[p] positions, from tokens[starts[p]] on."""

    starts: np.ndarray  # (pieces,) int64
    lengths: np.ndarray  # (pieces,) int32
    rows: np.ndarray  # (rows + 1,) int64
    counts: dict[str, int]  # documents: all, too short, too long; positions filled


def plan_rows(
    folder: str,
    name: str,
    split: Any,
    length: int,
    algorithm: str,
    long_documents: str,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """The plan of a training split, from `folder`; made there if it is not yet there.

    Args:
      folder: of the store.
      name: of the data source, for messages.
      split: has `offsets`, (documents + 1,) int64 starts of the documents, and the `fingerprint` of its content.
      length: positions of a row.
      algorithm: "first_fit" or "best_fit".
      long_documents: what to do with documents of more than length + 1 tokens: "split", "drop" or "error".
      progress: takes lines of text; None: standard error.

    Raises:
      DataError: a document is too long and long_documents is "error"; no document has a target; a damaged file.
    """
    facts = {"version": VERSION, "fingerprint": split.fingerprint}
    facts |= {"length": length, "algorithm": algorithm, "long_documents": long_documents}
    plans = os.path.join(folder, "plans")
    path = os.path.join(plans, f"{algorithm}-{length}-{long_documents}-v{VERSION}-{split.fingerprint[:16]}")
    if not os.path.isdir(path):
        talk = Progress(progress)
        try:
            os.makedirs(plans, exist_ok=True)
            with locked(path + ".lock", talk.note):
                if not os.path.isdir(path):  # nor made by the process that was waited for
                    plan = make_plan(split.offsets, length, algorithm, long_documents, name, talk)
                    _save(path, facts, plan)
                    talk.note(f"{name}: {_summary(plan, length, long_documents)}; kept in {path}")
        except OSError as error:
            raise DataError(
                f"The packing plan cannot be written to {path} ({error.strerror}): make room or give access there, or "
                "set data.cache_dir to another folder."
            ) from error
    return _open(path, facts)


def make_plan(
    offsets: np.ndarray,
    length: int,
    algorithm: str,
    long_documents: str,
    name: str = "",
    progress: Progress | None = None,
) -> Plan:
    starts, lengths, counts = cut_documents(offsets, length, long_documents, name)
    if not len(starts):
        raise DataError(
            f"No document of {len(offsets) - 1:,} in data source {name!r} can be packed into rows of "
            f"data.sequence_length={length}: {counts['too_short']:,} have fewer than two tokens, "
            f"{counts['too_long']:,} more than {length + 1:,} (data.long_documents={long_documents}). Raise "
            "data.sequence_length, or set data.long_documents=split."
        )
    pack = {"first_fit": first_fit, "best_fit": best_fit}[algorithm]
    with (progress or Progress(lambda line: None)).counting(f"{name}: packing", 4 * len(lengths)) as advance:
        row_of = pack(lengths, length, lambda pieces: advance(4 * pieces, pieces))
    row_of = _in_order_of_appearance(row_of)
    order = np.argsort(row_of, kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return Plan(starts[order], lengths[order].astype(np.int32), rows, counts | {"positions": int(lengths.sum())})


def cut_documents(
    offsets: np.ndarray, length: int, long_documents: str, name: str = ""
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Pieces of at most `length` positions, in the order of the documents.

    The parts of a split document overlap by one token, the last target of one being the first input of the next, so
    that each token but the document's first is a target exactly once.

    Returns:
      starts (pieces,) int64, lengths (pieces,) int64, counts of documents.
    """
    positions = np.diff(offsets) - 1
    too_long = positions > length
    counts = {
        "documents": len(positions),
        "too_short": int((positions < 1).sum()),
        "too_long": int(too_long.sum()),
    }
    if long_documents == "error" and counts["too_long"]:
        first = int(np.argmax(too_long))
        raise DataError(
            f"Document {first} (counted from 0) of data source {name!r} has {positions[first] + 1:,} tokens, more than "
            f"the {length + 1:,} that fit into a row of data.sequence_length={length}, as have "
            f"{counts['too_long'] - 1:,} others: raise data.sequence_length, or set data.long_documents to split or "
            "drop."
        )
    kept = np.flatnonzero((positions > 0) & ~(too_long & (long_documents == "drop")))
    parts = -(-positions[kept] // length)
    first = ranges(np.zeros_like(parts), parts) * length  # of each part, in its document
    starts = np.repeat(offsets[kept], parts) + first
    lengths = np.minimum(np.repeat(positions[kept], parts) - first, length)
    return starts, lengths, counts


def first_fit(sizes: np.ndarray, capacity: int, advance: Callable[[int], None] = lambda pieces: None) -> np.ndarray:
    """(pieces,) int64 row of each piece: the first row with room, of the last `OPEN_ROWS`; else a new one."""
    room = np.full(len(sizes), capacity, np.int64)
    row_of = np.empty(len(sizes), np.int64)
    smallest = int(sizes.min())
    low = high = 0  # the open rows
    for begin in range(0, len(sizes), _CHUNK):
        chunk = sizes[begin : begin + _CHUNK].tolist()
        for piece, size in enumerate(chunk, begin):
            row = low + int((room[low : high + 1] >= size).argmax())  # row `high` is empty, so that one always has room
            room[row] -= size
            row_of[piece] = row
            high = max(high, row + 1)
            while low < high and (room[low] < smallest or high - low > OPEN_ROWS):
                low += 1
        advance(len(chunk))
    return row_of


def best_fit(sizes: np.ndarray, capacity: int, advance: Callable[[int], None] = lambda pieces: None) -> np.ndarray:
    """(pieces,) int64 row of each piece: the longest first, each into the fullest row with room (best-fit decreasing).

    Rows wait in a list for each number of free positions; the bits of one integer tell which lists are not empty.
    """
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    not_empty = rows = 0
    row_of = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    for begin in range(0, len(sizes), _CHUNK):
        pieces = order[begin : begin + _CHUNK]
        chosen = []
        for size in sizes[pieces].tolist():
            with_room = not_empty >> size
            if with_room:
                room = size + (with_room & -with_room).bit_length() - 1
                row = waiting[room].pop()
                if not waiting[room]:
                    not_empty ^= 1 << room
            else:
                room, row, rows = capacity, rows, rows + 1
            chosen.append(row)
            if room > size:
                waiting[room - size].append(row)
                not_empty |= 1 << (room - size)
        row_of[pieces] = chosen
        advance(len(pieces))
    return row_of


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (sizes[0] numbers), then those from starts[1], and so on; int64."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)


def _in_order_of_appearance(row_of: np.ndarray) -> np.ndarray:
    """Rows numbered by their first piece: unshuffled, they follow the documents, and read the disk in order."""
    _, first = np.unique(row_of, return_index=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[row_of]


def _summary(plan: Plan, length: int, long_documents: str) -> str:
    rows = len(plan.rows) - 1
    parts = [f"packed {plan.counts['documents']:,} documents into {rows:,} rows of {length:,}"]
    parts += [f"{plan.counts['positions'] / (rows * length):.1%} full"]
    if plan.counts["too_long"]:
        fate = {"split": "split", "drop": "left out"}[long_documents]
        parts += [f"{plan.counts['too_long']:,} documents longer than a row {fate}"]
    if plan.counts["too_short"]:
        parts += [f"{plan.counts['too_short']:,} of a single token left out"]
    return ", ".join(parts)


# --------------------------------------------------------------------------------------------------- files


def _save(path: str, facts: dict, plan: Plan) -> None:
    partial = path + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.mkdir(partial)
    arrays = {name: getattr(plan, name) for name in _ARRAYS}
    for name, array in arrays.items():
        with open(os.path.join(partial, f"{name}.npy"), "wb") as stream:
            np.save(stream, array)
            sync_file(stream)
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    with open(os.path.join(partial, "plan.json"), "w", encoding="utf-8") as stream:
        json.dump(facts | {"counts": plan.counts, "crc32": checksums}, stream, indent=1)
        sync_file(stream)
    os.rename(partial, path)
    sync_folder(os.path.dirname(path))


def _open(path: str, facts: dict) -> Plan:
    try:
        with open(os.path.join(path, "plan.json"), encoding="utf-8") as stream:
            found = json.load(stream)
        arrays = {name: np.lib.format.open_memmap(os.path.join(path, f"{name}.npy"), "r") for name in _ARRAYS}
        checksums = {name: _checksum(array) for name, array in arrays.items()}
        sound = checksums == found["crc32"] and all(found[name] == fact for name, fact in facts.items())
        counts = found["counts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The packing plan {path} cannot be read ({error}): delete it, and it is made again."
        ) from error
    if not sound:
        raise DataError(f"The packing plan {path} is damaged: delete it, and it is made again.")
    return Plan(**arrays, counts=counts)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array)
