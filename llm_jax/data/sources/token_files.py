"""Files of token ids made by other programs: nanoGPT, llm.c, Megatron.

nanoGPT and llm.c write one flat array and mark where documents end (nanoGPT) or begin (llm.c) by an id. Given that id
every marked span is a document; without it a file is one document. Megatron's index lists the documents.
"""

import os
from collections.abc import Iterator

import numpy as np

from llm_jax.data.sources.documents import Document, InputFile
from llm_jax.data.sources.streams import Meter, reading
from llm_jax.errors import DataError

LLMC_MAGIC = 20240520
LLMC_HEADER = 256  # int32s: magic, version, token count, zeros
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# Megatron's numbers of its types; the others (signed bytes, floats) never hold ids.
_MEGATRON_TYPES = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}

PIECE = 1 << 22  # tokens; a longer document is handed out in pieces

Tokens = Iterator[tuple[int, Document]]  # the number counts pieces, from 1


def read_flat(file: InputFile, tokens: np.ndarray, eos_id: int | None, eos_first: bool, start: int) -> Tokens:
    """Documents of a flat array of ids, in pieces; with `eos_first` the end-of-document id opens a document."""
    if eos_id is None:
        borders = [0, len(tokens)]
    else:
        marks = _positions(tokens, eos_id) + (0 if eos_first else 1)
        borders = np.unique(np.concatenate([[0], marks, [len(tokens)]])).tolist()
    yield from _pieces(file, tokens, borders, start)


def _positions(tokens: np.ndarray, id: int) -> np.ndarray:
    found = [np.flatnonzero(tokens[i : i + PIECE] == id) + i for i in range(0, len(tokens), PIECE)]
    return np.concatenate(found).astype(np.int64)


def _pieces(file: InputFile, tokens: np.ndarray, borders: list[int], start: int) -> Tokens:
    number = 0
    for index, (first, last) in enumerate(zip(borders[:-1], borders[1:], strict=True), 1):
        id, group = f"{file.path}:{index}", f"{file.name}:{index}"
        for begin in range(first, last, PIECE):
            number += 1
            if number > start:
                piece = np.asarray(tokens[begin : min(begin + PIECE, last)])
                yield number, Document(id, group, tokens=piece, start=begin, continues=begin > first)


# -------------------------------------------------------------------------------------------- nanoGPT, llm.c


def nanogpt_tokens(path: str, size: int) -> np.ndarray:
    """A memory map of nothing but uint16 ids."""
    if size % 2:
        raise DataError(f"{path} has {size} bytes, an odd number: 16-bit token ids were cut short; copy it again.")
    with reading(path):
        if size >= 4 and int(np.fromfile(path, "<i4", 1)[0]) == LLMC_MAGIC:
            raise DataError(f"{path} begins with llm.c's header: set data.format=llmc.")
        return np.memmap(path, "<u2", "r")


def llmc_tokens(path: str, size: int) -> np.ndarray:
    """A memory map of the uint16 ids behind the header."""
    with reading(path):
        header = np.fromfile(path, "<i4", LLMC_HEADER)
    if len(header) == 0 or header[0] != LLMC_MAGIC:
        found = header[0] if len(header) else "nothing"
        raise DataError(f"{path} is not an llm.c token file: it begins with {found}, not the magic {LLMC_MAGIC}.")
    if len(header) < LLMC_HEADER:
        raise DataError(f"{path} ends inside llm.c's header of {4 * LLMC_HEADER} bytes: copy it again.")
    if header[1] != 1:
        raise DataError(f"{path} has version {header[1]} of llm.c's format: only version 1 (16-bit ids) is read.")
    promised, found = int(header[2]), (size - 4 * LLMC_HEADER) / 2
    if promised != found:
        raise DataError(f"{path} promises {promised} tokens in its header and holds {found:g}: copy it again.")
    with reading(path):
        return np.memmap(path, "<u2", "r", offset=4 * LLMC_HEADER) if promised else np.zeros(0, np.uint16)


# -------------------------------------------------------------------------------------------------- Megatron


def megatron_index(bin_path: str) -> str:
    return os.path.splitext(bin_path)[0] + ".idx"


def read_megatron(file: InputFile, start: int, meter: Meter) -> Tokens:
    """Documents of a .bin/.idx pair (Megatron-LM, core/datasets/indexed_dataset.py)."""
    tokens, borders = _open_megatron(file.path)
    meter(file.size)
    yield from _pieces(file, tokens, borders, start)


def _open_megatron(path: str) -> tuple[np.ndarray, list[int]]:
    index_path = megatron_index(path)
    with reading(index_path), open(index_path, "rb") as stream:
        index = stream.read()
    if not index.startswith(MEGATRON_MAGIC):
        raise DataError(f"{index_path} is not a Megatron index: it begins with {index[:9]!r}, not {MEGATRON_MAGIC!r}.")
    cut = DataError(f"{index_path} is cut short ({len(index)} bytes): copy it again.")
    if len(index) < 34:
        raise cut
    version, code = int.from_bytes(index[9:17], "little"), index[17]
    sequences, documents = (int(n) for n in np.frombuffer(index, "<u8", 2, 18))
    if version != 1 or code not in _MEGATRON_TYPES:
        raise DataError(f"{index_path} has version {version} and type {code}: only version 1 with integer ids is read.")
    if len(index) < 34 + 12 * sequences + 8 * documents:
        raise cut
    lengths = np.frombuffer(index, "<i4", sequences, 34).astype(np.int64)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    document_ends = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)  # in sequences; begins with 0

    kind = np.dtype(_MEGATRON_TYPES[code]).newbyteorder("<")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ends_fit = documents and document_ends[0] == 0 and document_ends[-1] == sequences and (lengths >= 0).all()
    if not ends_fit or (np.diff(document_ends) < 0).any() or (pointers != starts[:-1] * kind.itemsize).any():
        raise DataError(f"{index_path} does not list its documents one after the other: write it again.")
    with reading(path):
        size = os.path.getsize(path)
        if size != starts[-1] * kind.itemsize:
            promised = starts[-1] * kind.itemsize
            raise DataError(f"{path} has {size} bytes where {index_path} promises {promised}: copy both again.")
        tokens = np.memmap(path, kind, "r") if size else np.zeros(0, kind)
    return tokens, np.unique(starts[document_ends]).tolist()
