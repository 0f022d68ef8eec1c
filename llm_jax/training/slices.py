"""A checkpoint read slice by slice: no parameter is ever whole in memory, and no device holds any.

Orbax keeps an array as a zarr array, of this run's mesh or another, whose chunks tensorstore reads and puts together.
What is read is summed on the way, and in the end held against the fingerprints that were saved with the arrays.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import tensorstore

from llm_jax.training.arrays import CHUNK_BYTES, reraise_if_environment
from llm_jax.training.record import DamagedCheckpoint, check_fit, read_record, root_cause, some
from llm_jax.training.streamed import WORKERS, folder_name, sums

CACHE_BYTES = 256 << 20  # of decoded chunks, of which one may hold a few layers


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
        self._stores: dict[str, tensorstore.TensorStore] = {}
        self._sums: dict[str, dict[tuple[int, ...], tuple[int, int, int]]] = {}
        self._pool = ThreadPoolExecutor(WORKERS)

    def __enter__(self) -> "SavedArrays":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._check()

    def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """What lies at `index` of the first axes, in memory of its own."""
        try:
            if path not in self._stores:
                self._stores[path] = self._open(path)
            store = self._stores[path]
            found = np.ascontiguousarray(store[index].read().result() if index else store.read().result())
        except Exception as error:  # whatever tensorstore makes of files that are not what Orbax wrote
            reraise_if_environment(error)
            raise DamagedCheckpoint(f"{path} cannot be read ({root_cause(error)})") from error
        self._sums.setdefault(path, {})[index] = self._summed(found, index, store.shape)
        return found

    def _open(self, path: str) -> tensorstore.TensorStore:
        kvstore = {"driver": "file", "path": f"{self._state / folder_name(path)}/"}
        if (self._state / "manifest.ocdbt").exists():
            kvstore = {"driver": "ocdbt", "base": f"file://{self._state}/", "path": f"{folder_name(path)}/"}
        spec = {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_data": False, "recheck_cached_metadata": False}
        return tensorstore.open(spec, read=True, open=True, context=self._context).result()

    def _summed(self, block: np.ndarray, index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The block's part of its array's two sums (see `fingerprint.py`), and how many numbers it has."""
        flat = block.reshape(-1)
        offset = int(np.ravel_multi_index(index, shape[: len(index)])) * flat.size if index else 0
        piece = max(CHUNK_BYTES // block.dtype.itemsize, 1)
        each = lambda start: sums(flat[start : start + piece], offset + start)  # noqa: E731
        parts = list(self._pool.map(each, range(0, flat.size, piece)))
        return sum(part[0] for part in parts), sum(part[1] for part in parts), flat.size

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
