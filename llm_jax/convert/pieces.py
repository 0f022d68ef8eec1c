"""Large arrays a piece at a time, on several threads: reading, turning a matrix over and writing are all half the work
of one core beside a fast disk."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

PIECE_BYTES = 16 << 20
WORKERS = min(os.cpu_count() or 1, 8)  # threads, with one piece each
TILE = 128  # columns that are transposed at a time: they stay in the cache
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

T = TypeVar("T")


def each(work: Callable[[int], T], starts: Iterable[int]) -> list[T]:
    """`work` of each start, on several threads where there are several. All is done on return, whatever is raised."""
    starts = list(starts)
    if len(starts) < 2:
        return [work(start) for start in starts]
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, starts))


def rows_in(array: np.ndarray) -> int:
    """How many of the array's first axis make a piece; at least one."""
    return max(PIECE_BYTES * len(array) // max(array.nbytes, 1), 1)


def contiguous(part: np.ndarray) -> np.ndarray:
    """The array, or where it is not contiguous a copy that is."""
    if part.flags.c_contiguous:
        return part
    whole = np.empty(part.shape, part.dtype)
    fill(whole, part)
    return whole


def fill(into: np.ndarray, part: np.ndarray) -> None:
    """`into[...] = part`, several times faster where `part` is transposed: numpy walks over all its rows for each of
    its columns."""
    if part.dtype == into.dtype:  # as integers: of numbers that numpy does not know it would keep other threads waiting
        into, part = (array.view(BITS[array.dtype.itemsize]) for array in (into, part))
    if part.ndim < 2 or part.strides[-1] == part.itemsize:
        into[...] = part
        return
    for column in range(0, part.shape[-1], TILE):
        into[..., column : column + TILE] = part[..., column : column + TILE]
