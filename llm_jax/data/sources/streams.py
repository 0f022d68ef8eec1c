"""Files as streams of bytes: plain, gzip or Zstandard, where a file cut short is an error and not a short file."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from llm_jax.data.sources.documents import require
from llm_jax.errors import DataError

Meter = Callable[[int], None]  # told how many more bytes of the input files were read

_BLOCK = 1 << 17


@contextlib.contextmanager
def open_stream(path: str, meter: Meter) -> Iterator[BinaryIO]:
    """The file's content, decompressed; whatever is wrong with it while it is read is a DataError that names it."""
    with reading(path), io.BufferedReader(_Metered(path, meter), _BLOCK) as raw:
        if path.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream
        elif path.endswith(".zst"):
            with io.BufferedReader(_Zstandard(raw, path), _BLOCK) as stream:
                yield stream
        else:
            yield raw


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what the operating system and gzip raise into a DataError that names the file."""
    try:
        yield
    except EOFError as error:
        raise cut_short(path) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a sound gzip file ({error}): fetch or compress it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def cut_short(path: str) -> DataError:
    return DataError(f"{path} ends in the middle of its compressed data: it was cut short; fetch it again.")


class _Metered(io.FileIO):
    def __init__(self, path: str, meter: Meter):
        super().__init__(path, "rb")
        self._meter = meter

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._meter(count)
        return count

    def readall(self) -> bytes:
        content = super().readall()
        self._meter(len(content))
        return content


class _Zstandard(io.RawIOBase):
    """All frames of a .zst file. The library's own stream reader takes a truncated file for a complete one."""

    def __init__(self, raw: BinaryIO, path: str):
        self._library = require("zstandard", "data", f"Reading {path}")
        self._raw, self._path = raw, path
        self._frame = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            chunk = self._input or self._raw.read(_BLOCK)
            if not chunk:
                if self._frame is not None and not self._frame.eof:
                    raise cut_short(self._path)
                return 0
            self._decompress(chunk)
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self, chunk: bytes) -> None:
        if self._frame is None or self._frame.eof:
            self._frame = self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(chunk))
        except self._library.ZstdError as error:
            raise DataError(f"{self._path} is not a sound Zstandard file ({error}): fetch it again.") from error
        self._input = self._frame.unused_data if self._frame.eof else b""
