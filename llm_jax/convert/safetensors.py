"""Safetensors files, read and written one tensor at a time: at no moment is more than one in memory.

The format: 8 bytes of little-endian length, that much JSON ({name: {"dtype", "shape", "data_offsets"}}), then the
tensors' bytes. What a file says of itself is checked before any of it is believed.
"""

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llm_jax.convert import pieces
from llm_jax.errors import DataError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100 << 20  # the format's own limit
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int  # byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor. Raises DataError where the file ends before it does."""
        array = pieces.empty((self.nbytes,), np.dtype(np.uint8))

        def one(start: int) -> None:
            self.read_bytes(start, memoryview(array)[start : start + pieces.PIECE_BYTES])

        if self.nbytes <= pieces.PIECE_BYTES:
            one(0)
        else:
            with pieces.Workers() as workers:
                workers.each(one, range(0, self.nbytes, pieces.PIECE_BYTES))
        return array.view(self.dtype).reshape(self.shape)

    def read_bytes(self, start: int, into: memoryview) -> None:
        """The tensor's bytes from `start` on, as many as there is room for. Raises as `read`."""
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.start + start)
            while into:
                count = stream.readinto(into)
                if not count:
                    raise DataError(f"{self.file}: the file ends inside {self.name}; fetch it again")
                into = into[count:]


# --------------------------------------------------------------------------------------------------- reading


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises DataError where the file is cut off or does not hold what its header says."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise DataError(f"{path}: no safetensors file, or a cut one: {size} bytes cannot hold a header of {length}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: its header is damaged ({error}); fetch the file again") from None
    _check_extents(path, list(tensors.values()), 8 + length, size)
    return tensors


def _tensor(name: str, entry: Mapping[str, Any], path: Path, base: int) -> Tensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise DataError(f"{path}: {name} has the dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    tensor = Tensor(name, DTYPES[entry["dtype"]], shape, path, base + start)
    if any(not isinstance(n, int) or n < 0 for n in (start, end, *shape)) or end - start != tensor.nbytes:
        told = f"{entry['dtype']}{list(shape)} takes {tensor.nbytes} bytes, and its offsets are {start} and {end}"
        raise DataError(f"{path}: the header is wrong about {name}: {told}; fetch the file again")
    return tensor


def _check_extents(path: Path, tensors: list[Tensor], base: int, size: int) -> None:
    """The tensors lie one after the other and fill the file: the format has no holes."""
    expected = base
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != expected:
            raise DataError(f"{path}: {tensor.name} lies at byte {tensor.start}, and the one before ends at {expected}")
        expected += tensor.nbytes
        if expected > size:
            raise DataError(
                f"{path} is cut off: it has {size} bytes, and {tensor.name} ends at {expected}; fetch the file again"
            )
    if expected != size:
        raise DataError(f"{path}: {size - expected} bytes behind its last tensor belong to none; fetch the file again")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: one file, or several with an index.

    Raises:
      DataError: there are no such files; a file that the index names is missing or damaged, or lacks a tensor.
    """
    if (folder / INDEX).is_file():
        return _read_index(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    raise without_weights(str(folder), [path.name for path in folder.iterdir()])


def without_weights(where: str, names: Sequence[str]) -> DataError:
    """What is wrong with a folder, or a repository, of these files, which has no `SINGLE` and no `INDEX`."""
    if files := sorted(name for name in names if fnmatchcase(name, "*.safetensors") and "/" not in name):
        return DataError(f"{where} holds {', '.join(files[:4])}, and neither {SINGLE} nor {INDEX} that says what it is")
    if pickles := sorted(name for name in names if fnmatchcase(name, "pytorch_model*.bin") and "/" not in name):
        return DataError(
            f"{where} holds {pickles[0]} alone, a pickle: reading one runs whatever code its author put in. Where you "
            "trust it, load it with transformers and save_pretrained(...) it: that writes safetensors"
        )
    return DataError(f"{where} holds no {SINGLE} and no {INDEX}")


def shard_names(folder: Path) -> list[str]:
    """The files that a folder's index names, or the one file of a checkpoint without an index."""
    return _read_map(folder / INDEX)[1] if (folder / INDEX).is_file() else [SINGLE]


def _read_map(path: Path) -> tuple[dict[str, str], list[str]]:
    """Which tensor lies in which file, and the files."""
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return where, sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def _read_index(folder: Path) -> dict[str, Tensor]:
    path = folder / INDEX
    where, files = _read_map(path)
    found: dict[str, Tensor] = {}
    for name in files:
        if os.path.basename(name) != name or not (folder / name).is_file():
            lost = next(tensor for tensor, file in where.items() if file == name)
            raise DataError(f"{folder / name} is missing: {path} says that it holds {lost}; fetch the file again")
        found |= {key: tensor for key, tensor in read_header(folder / name).items()}
    for name, file in where.items():
        if name not in found or found[name].file.name != file:
            raise DataError(f"{folder / file}: the tensor {name} is missing, and {path} says that it is there")
    for name, tensor in found.items():
        if name not in where:
            raise DataError(f"{tensor.file}: the tensor {name} has no entry in {path}")
    return found


# --------------------------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(tensors: Sequence[Planned], largest: int) -> list[list[Planned]]:
    """Tensors in their order, cut into files of at most `largest` bytes (or of one tensor that is larger)."""
    files: list[list[Planned]] = [[]]
    room = largest
    for tensor in tensors:
        if files[-1] and tensor.nbytes > room:
            files.append([])
            room = largest
        files[-1].append(tensor)
        room -= tensor.nbytes
    return files


def write_folder(
    folder: Path,
    tensors: Sequence[Planned],
    produce: Callable[[Planned], np.ndarray],
    *,
    largest: int,
) -> None:
    """Write a checkpoint: `produce` is asked for one tensor after the other, in order; where there is room
    (`pieces.ahead`) on another thread, while the one before is written.

    Raises ValueError where it gives another shape or dtype than planned.
    """
    files = shards(tensors, largest)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    names = [SINGLE] if len(files) == 1 else names
    for name, part in zip(names, files, strict=True):
        write_file(folder / name, part, produce)
    if len(files) > 1:
        where = {tensor.name: name for name, part in zip(names, files, strict=True) for tensor in part}
        total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        text = json.dumps({"metadata": total, "weight_map": where}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Sequence[Planned], produce: Callable[[Planned], np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers looks for
    place = 0
    for tensor in tensors:
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.name] = entry | {"data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    with open(path, "wb", buffering=0) as stream, pieces.Workers() as workers:
        write_all(stream, len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        for tensor, array in pieces.ahead(tensors, produce, lambda tensor: tensor.nbytes):
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name} is {array.dtype}{array.shape}, planned was {tensor}")
            write_array(stream, start, array, workers)
            start += tensor.nbytes
            del array  # before the next is made
        os.fsync(stream.fileno())


def write_array(stream: Any, start: int, array: np.ndarray, workers: pieces.Workers) -> None:
    """The array's bytes from byte `start` of a file on. A transposed one is never twice in memory."""
    array = array.reshape(-1) if array.flags.c_contiguous else array
    writing = threading.Lock()  # a file takes one piece at a time, and threads that wait there would wait busily

    def write_rows(first: int) -> None:
        rows = workers.contiguous(array[first : first + step])
        with writing:
            stream.seek(start + first * row_bytes)
            write_all(stream, rows.reshape(-1).view(np.uint8))

    if array.size:
        step, row_bytes = pieces.rows_in(array), array.nbytes // len(array)
        workers.each(write_rows, range(0, len(array), step))


def write_all(stream: Any, content: Any) -> None:
    view = memoryview(content)
    while view:
        view = view[stream.write(view[: 64 << 20]) :]
