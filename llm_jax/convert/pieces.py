"""Large arrays a piece at a time, on several threads: reading, turning a matrix over and writing are all half the work
of one core beside a fast disk."""

import concurrent.futures
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

PIECE_BYTES = 16 << 20
WORKERS = min(os.cpu_count() or 1, 8)  # threads, with one piece each
TILE = 128  # columns that are transposed at a time: they stay in the cache
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

T, Item = TypeVar("T"), TypeVar("Item")


class Workers:
    """Threads, each with a piece of memory that it uses again and again: the pages of new memory must be found first,
    and where files fill it that takes longer than what is done with them. A context manager."""

    def __init__(self) -> None:
        self._pool, self._own = ThreadPoolExecutor(WORKERS), threading.local()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown()

    def each(self, work: Callable[[int], T], starts: Iterable[int]) -> list[T]:
        """`work` of each start, on the threads. All is done on return, whatever is raised."""
        coming = [self._pool.submit(work, start) for start in starts]
        concurrent.futures.wait(coming)
        return [future.result() for future in coming]

    def scratch(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The calling thread's memory as an array of any numbers, which is its own until it asks again."""
        size = math.prod(shape)
        if len(getattr(self._own, "memory", ())) < size * dtype.itemsize:
            self._own.memory = empty((size * dtype.itemsize,), np.dtype(np.uint8))
        return np.frombuffer(self._own.memory, dtype, size).reshape(shape)

    def contiguous(self, part: np.ndarray) -> np.ndarray:
        """The array, or where it is not contiguous a copy in the thread's memory."""
        if part.flags.c_contiguous:
            return part
        whole = self.scratch(part.shape, part.dtype)
        fill(whole, part)
        return whole


def ahead(items: Sequence[Item], make: Callable[[Item], T], size: Callable[[Item], int]) -> Iterator[tuple[Item, T]]:
    """Each item with what `make` makes of it, in order; while one is in use the next is made on a thread of its own.

    Only where the two are no larger (`size`, in bytes) than the largest of all: what is there at a time is never more
    than that.
    """
    room, coming = max(map(size, items), default=0), None
    with ThreadPoolExecutor(1) as pool:
        for place, item in enumerate(items):
            made = coming.result() if coming else make(item)
            following = items[place + 1 : place + 2]
            fits = following and size(item) + size(following[0]) <= room
            coming = pool.submit(make, following[0]) if fits else None
            yield item, made
            del made


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array of zeros, of memory that goes back to the system with it.

    numpy asks for huge pages, for which the system moves others where files fill the memory: that took longer than all
    of a conversion besides.
    """
    size, private = math.prod(shape), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # memory of several processes is slower
    return np.frombuffer(mmap.mmap(-1, max(size * dtype.itemsize, 1), private), dtype, size).reshape(shape)


def rows_in(array: np.ndarray) -> int:
    """How many of the array's first axis make a piece; at least one."""
    return max(PIECE_BYTES * len(array) // max(array.nbytes, 1), 1)


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
