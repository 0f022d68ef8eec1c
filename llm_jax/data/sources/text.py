"""Text files: a document each, or many divided by a separator."""

from collections.abc import Iterator

from llm_jax.data.sources.documents import BadRecord, Document, InputFile, text_document
from llm_jax.data.sources.streams import Meter, open_stream
from llm_jax.errors import DataError

LARGEST_DOCUMENT = 4 << 30  # bytes; a document is held in memory


def read_text(
    file: InputFile, separator: str, start: int, meter: Meter, group: str | None = None
) -> Iterator[tuple[int, Document | BadRecord]]:
    """(record number, document), from the record after `start`. Bytes are kept as they are, line ends included."""
    if separator:
        yield from _read_separated(file, separator.encode(), start, meter)
    elif start < 1:
        if file.size > LARGEST_DOCUMENT:
            gigabytes = file.size / 2**30
            raise DataError(f"{file.path} is one document of {gigabytes:.1f} GiB: set data.separator to divide it.")
        with open_stream(file.path, meter) as stream:
            raw = stream.read()
        yield 1, text_document(raw, file.path, group or file.name)


def _read_separated(file: InputFile, separator: bytes, start: int, meter: Meter):
    number = 0
    with open_stream(file.path, meter) as stream:
        # Cutting bytes is safe: in UTF-8 one character's bytes never begin inside another's.
        for raw in _split(stream, separator):
            number += 1
            if number > start:
                yield number, text_document(raw, f"{file.path}:{number}", f"{file.name}:{number}")


def _split(stream, separator: bytes) -> Iterator[bytes]:
    rest = b""
    # The block grows with the unfinished document, so that a long one is not copied over and over.
    while block := stream.read(max(1 << 20, len(rest))):
        *whole, rest = (rest + block).split(separator)
        yield from whole
    yield rest
