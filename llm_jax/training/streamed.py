"""A checkpoint written slice by slice: no parameter is ever whole in memory.

Each parameter is a zarr array in a folder of its own, cut into chunks that lie within one layer and one expert, so that
a slice of it is a few files. When all are written, Orbax saves a checkpoint of the same names with one number each, and
the finished arrays take the place of those: what surrounds them is Orbax's own, and it reads them like any others.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from llm_jax.errors import DataError
from llm_jax.training.checkpoint import _nested, _quiet_libraries
from llm_jax.training.record import sealed

CHUNK_BYTES = 16 << 20
IN_FLIGHT = 4  # chunks that wait for the disk
FEW = 1 << 16  # numbers


@dataclasses.dataclass
class Written:
    """What is known of one array so far: its two sums (see `fingerprint.py`) and how many numbers were written."""

    array: Any  # tensorstore.TensorStore
    first: int = 0
    second: int = 0
    count: int = 0


class StreamedCheckpoint:
    """The arrays of one checkpoint, in any order of slices.

    Args:
      staging: a new folder for the arrays, on the file system of the run's.
      shapes: {path: ShapeDtypeStruct}, paths as in a checkpoint ("params/stack/blocks/mlp/up/kernel").
      depths: {path: how many first axes are written one index at a time}.
    """

    def __init__(
        self, staging: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], depths: Mapping[str, int]
    ):
        self.staging, self.shapes, self.depths = staging, dict(shapes), dict(depths)
        self._flying: deque[Any] = deque()
        self._written = {path: Written(self._create(path)) for path in self.shapes}

    def _create(self, path: str) -> Any:
        shape, depth = self.shapes[path].shape, self.depths[path]
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self.staging / folder_name(path)}/"},
            "metadata": {
                "shape": list(shape),
                "data_type": self.shapes[path].dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": chunk_shape(shape, depth, self.shapes[path].dtype.itemsize)},
                },
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "store_data_equal_to_fill_value": True,
        }
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
        return tensorstore.open(spec, create=True, context=context).result()

    def write(self, path: str, index: tuple[int, ...], values: np.ndarray, source: str) -> None:
        """Write what lies at `index` of the first axes; where `values` are fewer than there is room, zeros follow.

        Raises DataError where a number is not finite, naming `source`.
        """
        written, room = self._written[path], self.shapes[path].shape[len(index) :]
        dtype = self.shapes[path].dtype
        rows = chunk_shape(self.shapes[path].shape, self.depths[path], dtype.itemsize)[len(index)]
        offset = int(np.ravel_multi_index(index, self.shapes[path].shape[: len(index)])) if index else 0
        offset *= math.prod(room)
        for start in range(0, room[0], rows):
            stop = min(start + rows, room[0])
            block = block_of(values, start, stop, room, dtype)
            first, second, finite = sums(block, offset + start * math.prod(room[1:]))
            if not finite:
                raise DataError(f"{source} holds numbers that are not finite: it is damaged, or its training had failed")
            written.first += first
            written.second += second
            written.count += block.size
            while len(self._flying) >= IN_FLIGHT:
                self._flying.popleft().result()
            self._flying.append(written.array[(*index, slice(start, stop))].write(block))

    def finish(self, workdir: Path, step: int) -> None:
        """Make it checkpoint `step` of the run in `workdir`; `flush` it before it is relied on. Raises ValueError where something was never written."""
        for future in self._flying:
            future.result()
        lost = [path for path, written in self._written.items() if written.count != math.prod(self.shapes[path].shape)]
        if lost:
            raise ValueError(f"these were not written once and whole: {lost}")
        described = {
            path: {
                "shape": list(shape.shape),
                "dtype": str(shape.dtype),
                "fingerprint": [self._written[path].first % 2**32, self._written[path].second % 2**32],
            }
            for path, shape in self.shapes.items()
        }
        ones = {path: np.zeros((1,) * len(shape.shape), shape.dtype) for path, shape in self.shapes.items()}
        folder = workdir / "checkpoints" / str(step)
        context = ocp.Context()
        context.array.saving.use_ocdbt = False
        context.array.saving.use_zarr3 = True
        with _quiet_libraries(), context:
            record = sealed(step, described, {}, {})
            ocp.save_checkpointables(folder, {"state": _nested(ones)}, custom_metadata=record)
        for path in self.shapes:
            place = folder / "state" / folder_name(path)
            shutil.rmtree(place)
            os.rename(self.staging / folder_name(path), place)
        self.staging.rmdir()


def folder_name(path: str) -> str:
    """Orbax's name of an array's folder."""
    return path.replace("/", ".")


def chunk_shape(shape: tuple[int, ...], depth: int, itemsize: int) -> list[int]:
    """Chunks of about `CHUNK_BYTES`: some rows of one layer and one expert."""
    room = shape[depth:]
    rows = max(CHUNK_BYTES // (math.prod(room[1:]) * itemsize), 1)
    return [*(1,) * depth, min(rows, room[0]), *room[1:]]


def block_of(values: np.ndarray, start: int, stop: int, room: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Rows `start` to `stop` of `values`, zeros where it has none, contiguous."""
    part = values[start:stop]
    if part.shape == (stop - start, *room[1:]):
        return np.ascontiguousarray(part, dtype)
    block = np.zeros((stop - start, *room[1:]), dtype)
    block[tuple(slice(size) for size in part.shape)] = part
    return block


def sums(block: np.ndarray, offset: int) -> tuple[int, int, bool]:
    """What a contiguous block adds to its array's two sums (see `fingerprint.py`), and whether all of it is finite.

    `offset`: row-major number of its first element.
    """
    finite = True
    if block.dtype.itemsize == 8:  # as two numbers of 32 bits each, the lower first
        finite, bits, offset = bool(np.isfinite(block).all()), block.reshape(-1).view(np.uint32), 2 * offset
        exponent = 0
    else:
        bits = block.reshape(-1).view({2: np.uint16, 4: np.uint32}[block.dtype.itemsize])
        exponent = 0x7F800000 if block.dtype.itemsize == 4 else 0x7F80
    if len(bits) < FEW:  # zeros add nothing, and one size is compiled in place of many
        bits = np.concatenate([bits, np.zeros(FEW - len(bits), bits.dtype)])
    with cpu():
        first, second, all_finite = np.asarray(_sums(bits, np.uint32(offset % 2**32), exponent=exponent)).tolist()
    return first, second, finite and bool(all_finite)


@functools.partial(jax.jit, static_argnames="exponent")
def _sums(bits: jax.Array, offset: jax.Array, exponent: int) -> jax.Array:
    """`exponent`: the bits that are all set in what is not finite (float32, bfloat16); 0: not asked."""
    wide = bits.astype(jnp.uint32)
    index = jax.lax.iota(jnp.uint32, len(bits)) + offset
    finite = ((wide & exponent) != exponent).all() if exponent else jnp.bool_(True)
    return jnp.stack([wide.sum(dtype=jnp.uint32), (wide * (2 * index + 1)).sum(dtype=jnp.uint32), finite.astype(jnp.uint32)])


def cpu() -> contextlib.AbstractContextManager[Any]:
    """Compute in the host, where the block lies."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to start without it
        return contextlib.nullcontext()


def flush(folder: Path) -> None:
    """Wait until every file and folder is on the disk."""
    for root, _, files in os.walk(folder):
        for name in (".", *files):
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
