"""A checkpoint read slice by slice: no parameter is ever whole in memory, and no device holds any.

Orbax keeps an array as a zarr array, of this run's mesh or another, whose chunks tensorstore reads and puts together.
What is read is summed on the way, and in the end held against the fingerprints that were saved with the arrays.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import tensorstore

from llm_jax.convert import pieces
from llm_jax.training.arrays import reraise_if_environment
from llm_jax.training.record import DamagedCheckpoint, check_fit, read_record, root_cause, some
from llm_jax.training.streamed import folder_name, sums

CACHE_BYTES = 256 << 20  # of decoded chunks that hold several layers; others are read once


class SavedArrays:
    """Some arrays of a finished checkpoint. A context manager; its end looks whether all that was read is as saved.

    Args:
      path: the checkpoint's folder.
      shapes: {path: ShapeDtypeStruct} of the arrays that will be read, paths as in a checkpoint ("params/...").

    Raises:
      DamagedCheckpoint: something cannot be read, or what was read is not what was saved.
      UserError: an array is missing, or has another shape or dtype.
    """

    def __init__(self, path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]):
        self._state, self._arrays = path / "state", read_record(path)["arrays"]
        check_fit(path, self._arrays, shapes, partial=True)
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._workers = pieces.Workers()
        self._stores: dict[str, tensorstore.TensorStore] = {}
        self._sums: dict[str, dict[tuple[int, ...], tuple[int, int, int]]] = {}

    def __enter__(self) -> "SavedArrays":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._workers.close()
        if kind is None:
            self._check()

    def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """What lies at `index` of the first axes, in memory of its own."""
        try:
            if path not in self._stores:
                self._stores[path] = self._open(path, len(index))
            found, first, second = _read(self._stores[path], index, self._workers)
        except Exception as error:  # whatever tensorstore makes of files that are not what Orbax wrote
            reraise_if_environment(error)
            raise DamagedCheckpoint(f"{path} cannot be read ({root_cause(error)})") from error
        self._sums.setdefault(path, {})[index] = (first, second, found.size)
        return found

    def _open(self, path: str, depth: int) -> tensorstore.TensorStore:
        """`depth`: how many first axes are read one index at a time."""
        kvstore = {"driver": "file", "path": f"{self._state / folder_name(path)}/"}
        if (self._state / "manifest.ocdbt").exists():
            kvstore = {"driver": "ocdbt", "base": f"file://{self._state}/", "path": f"{folder_name(path)}/"}
        spec = {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_data": False, "recheck_cached_metadata": False}
        store = tensorstore.open(spec, read=True, open=True).result()
        if max(store.chunk_layout.read_chunk.shape[:depth], default=1) > 1:
            store = tensorstore.open(spec, read=True, open=True, context=self._context).result()
        return store

    def _check(self) -> None:
        different = []
        for path, parts in self._sums.items():
            first, second, count = (sum(part[i] for part in parts.values()) for i in range(3))
            if count != math.prod(self._arrays[path]["shape"]):
                raise ValueError(f"of {path} {count} numbers were read, so it cannot be held against its fingerprint")
            if [first % 2**32, second % 2**32] != self._arrays[path]["fingerprint"]:
                different.append(path)
        if different:
            raise DamagedCheckpoint(f"{some(different)} {'is' if len(different) == 1 else 'are'} not what was saved")


def _read(
    store: tensorstore.TensorStore, index: tuple[int, ...], workers: pieces.Workers
) -> tuple[np.ndarray, int, int]:
    """What lies at `index`, and its part of its array's two sums (see `fingerprint.py`)."""
    part, shape = store[index], store.shape[len(index) :]
    if not shape:
        part = part[tensorstore.newaxis]
    found = pieces.empty(part.shape, store.dtype.numpy_dtype)
    offset = int(np.ravel_multi_index(index, store.shape[: len(index)])) * found.size if index else 0
    rows = rows_of_chunks(found, store.chunk_layout.read_chunk.shape[len(index)] if shape else 1)

    def read_rows(start: int) -> tuple[int, int]:
        block = found[start : start + rows]
        tensorstore.array(block, copy=False, write=True).write(part[start : start + len(block)]).result()
        return sums(block, offset + start * math.prod(shape[1:]))[:2]

    both = workers.each(read_rows, range(0, len(found), rows))
    return found.reshape(shape), sum(first for first, _ in both), sum(second for _, second in both)


def rows_of_chunks(array: np.ndarray, chunk: int) -> int:
    """Rows to read at a time, about a piece: whole chunks, `chunk` rows each, for one is decoded whole."""
    return max(pieces.rows_in(array) // chunk, 1) * chunk
