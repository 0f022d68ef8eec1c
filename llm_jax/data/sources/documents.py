"""What every reader yields: documents, and records that could not become one."""

import dataclasses
import importlib
from types import ModuleType

import numpy as np

from llm_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, or the token ids of one text.

    `id` names it in messages ("/data/a.jsonl:12"). `group` decides the side of the validation split it falls on; it
    holds names relative to the source's folder, so that the split is the same wherever the folder lies.
    """

    id: str
    group: str
    text: str | None = None
    tokens: np.ndarray | None = None  # (n,) unsigned integers
    start: int = 0  # tokens: position of the first one in its file
    continues: bool = False  # tokens: the rest of the document before (long token files come in pieces)

    def __len__(self) -> int:
        """Characters of a text, or tokens."""
        return len(self.tokens if self.text is None else self.text)


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used; `reason` begins with its id."""

    reason: str


@dataclasses.dataclass(frozen=True)
class InputFile:
    path: str  # absolute; "hf:..." for a hub dataset
    name: str  # relative to the source's folder, with "/"
    size: int = 0  # bytes
    mtime_ns: int = 0


def text_document(raw: bytes, id: str, group: str) -> Document | BadRecord:
    """The document of some UTF-8 bytes."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(f"{id} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}")
    return checked_text(text, id, group)


def checked_text(text: str, id: str, group: str) -> Document | BadRecord:
    """The document of a string, unless it holds what no UTF-8 text file can hold."""
    zero = text.find("\x00")
    if zero >= 0:
        return BadRecord(f"{id} holds binary data, not text: a NUL byte at character {zero}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return BadRecord(f"{id} is not valid Unicode: a lone surrogate at character {error.start}")
    return Document(id, group, text=text)


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional library, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise DataError(f"{what} needs the library {library}: pip install 'llm-jax[{extra}]'.") from error
