"""A checkpoint written slice by slice: no parameter is ever whole in memory.

Each parameter is a zarr array in a folder of its own, cut into chunks that lie within one layer and one expert, so that
a slice of it is a few files, which are written as they are in memory. When all are written, Orbax saves a checkpoint of
the same names with one number each, and the finished arrays take the place of those: what surrounds them is Orbax's
own, and it reads them like any others.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from llm_jax.convert import pieces
from llm_jax.convert.safetensors import write_all
from llm_jax.errors import DataError
from llm_jax.training.arrays import CHUNK_BYTES, nested, quiet_libraries
from llm_jax.training.record import sealed

PIECE = 1 << 16  # numbers that are summed at a time: they stay in the cache


@dataclasses.dataclass
class Written:
    """What is known of one array so far: its two sums (see `fingerprint.py`) and how many numbers were written."""

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

    def __init__(self, staging: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], depths: Mapping[str, int]):
        self.staging, self.shapes, self.depths = staging, dict(shapes), dict(depths)
        self._workers = pieces.Workers()
        self._written = {path: Written() for path in self.shapes}
        for path in self.shapes:
            self._create(path)

    def _create(self, path: str) -> None:
        """What tells readers of the array its shape, dtype and chunks."""
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
        }
        tensorstore.open(spec, create=True).result()

    def write(self, path: str, index: tuple[int, ...], values: np.ndarray, source: str) -> None:
        """Write what lies at `index` of the first axes; where `values` are fewer than there is room, zeros follow.

        Raises DataError where a number is not finite, naming `source`.
        """
        written, room = self._written[path], self.shapes[path].shape[len(index) :]
        dtype = self.shapes[path].dtype
        rows = chunk_shape(self.shapes[path].shape, self.depths[path], dtype.itemsize)[len(index)]
        offset = int(np.ravel_multi_index(index, self.shapes[path].shape[: len(index)])) if index else 0
        offset *= math.prod(room)

        def write_rows(start: int) -> tuple[int, int, bool, int]:
            stop = min(start + rows, room[0])
            block = self._block(values, start, stop, room, dtype)
            found = sums(block, offset + start * math.prod(room[1:]))
            self._write_chunk(path, (*index, start // rows, *(0,) * (len(room) - 1)), rows, block)
            return *found, block.size

        for first, second, finite, count in self._workers.each(write_rows, range(0, room[0], rows)):
            if not finite:
                raise DataError(f"{source} holds numbers that are not finite: it is damaged, or its training failed")
            written.first += first
            written.second += second
            written.count += count

    def _block(self, values: np.ndarray, start: int, stop: int, room: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Rows `start` to `stop` of `values`, zeros where it has none, contiguous."""
        part, shape = values[start:stop], (stop - start, *room[1:])
        if part.shape == shape and part.flags.c_contiguous and part.dtype == dtype:
            return part
        block = self._workers.scratch(shape, dtype)
        if part.shape != shape:
            block[...] = 0
        pieces.fill(block[tuple(slice(size) for size in part.shape)], part)
        return block

    def _write_chunk(self, path: str, number: tuple[int, ...], rows: int, block: np.ndarray) -> None:
        """One file: a chunk's bytes as they are in memory, filled up to its `rows` (zarr 3, codec "bytes")."""
        place = self.staging / folder_name(path) / "c" / "/".join(map(str, number))
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place, "wb", buffering=0) as stream:
            write_all(stream, block.reshape(-1).view(np.uint8))
            write_all(stream, bytes((rows - len(block)) * block[0].nbytes))

    def finish(self, workdir: Path, step: int) -> None:
        """Make it checkpoint `step` of the run in `workdir`; `flush` it before it is relied on.

        Raises ValueError where something was never written.
        """
        self._workers.close()
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
        with quiet_libraries(), context:
            record = sealed(step, described, {}, {})
            ocp.save_checkpointables(folder, {"state": nested(ones)}, custom_metadata=record)
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


def sums(block: np.ndarray, offset: int) -> tuple[int, int, bool]:
    """What a contiguous block adds to its array's two sums (see `fingerprint.py`), and whether all of it is finite.

    `offset`: row-major number of its first element.
    """
    flat, finite = block.reshape(-1), True
    if block.dtype.itemsize == 8:  # as two numbers of 32 bits each, the lower first
        finite, bits, offset, exponent = bool(np.isfinite(flat).all()), flat.view(np.uint32), 2 * offset, None
    elif block.dtype.itemsize == 4:
        bits, exponent = flat.view(np.uint32), np.uint32(0x7F800000)
    else:
        bits, exponent = flat.view(np.uint16), np.uint16(0x7F80)
    first = second = 0
    odd = 2 * np.arange(min(PIECE, len(bits)), dtype=np.uint32) + 1
    for start in range(0, len(bits), PIECE):
        piece = bits[start : start + PIECE]
        if exponent is not None:  # its bits are all set in what is not finite
            finite &= bool((piece & exponent).max() != exponent)
        wide = piece.astype(np.uint32)
        total = int(wide.sum(dtype=np.uint32))
        first += total
        second += int(np.einsum("i,i", wide, odd[: len(wide)])) + 2 * (offset + start) * total  # np.dot takes twice it
    return first % 2**32, second % 2**32, finite


def flush(folder: Path) -> None:
    """Wait until every file and folder is on the disk."""
    for root, _, files in os.walk(folder):
        for name in (".", *files):
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
