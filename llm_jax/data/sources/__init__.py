"""Turns a SourceConfig into documents: finds the files, tells their format, reads them lazily in a fixed order."""

import dataclasses
import functools
import glob
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from llm_jax.config.schema import BUILT_IN, DATA_FORMATS, TOKEN_FORMATS, SourceConfig
from llm_jax.data.sources import builtin, docstrings, hub, records, text, token_files
from llm_jax.data.sources.documents import BadRecord, Document, InputFile
from llm_jax.data.sources.streams import Meter, reading
from llm_jax.errors import ConfigError, DataError

__all__ = ["BadRecord", "Document", "InputFile", "Position", "Source", "open_source"]

_RECORD_FORMATS = ("jsonl", "parquet", "arrayrecord", "hf")


class Position(NamedTuple):
    """How far a source has been read."""

    file: int = 0
    record: int = 0  # the last one read of that file, counting from 1


START = Position()


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of one format, in a fixed order."""

    path: str  # as the config has it
    format: str
    files: tuple[InputFile, ...]
    text_key: str = "text"
    separator: str = ""
    split: str = "train"  # of a Hugging Face data set
    eos_id: int | None = None  # marks the documents of nanogpt and llmc files

    @property
    def has_text(self) -> bool:
        return self.format not in TOKEN_FORMATS

    @property
    def size(self) -> int:
        """Bytes of all files that are read."""
        return sum(file.size for file in self.files)

    @functools.cached_property
    def inputs(self) -> tuple[InputFile, ...]:
        """Every file the documents depend on."""
        if self.format != "megatron":
            return self.files
        indexes = [(token_files.megatron_index(f.path), token_files.megatron_index(f.name)) for f in self.files]
        return self.files + tuple(input_file(path, name) for path, name in indexes)

    def identity(self) -> dict[str, Any]:
        """JSON-able: equal for two sources only where they yield the same documents, as far as files' dates tell."""
        identity: dict[str, Any] = {"format": self.format, "files": [dataclasses.astuple(f) for f in self.inputs]}
        if self.format in _RECORD_FORMATS:
            identity["text_key"] = self.text_key
        if self.format == "hf":
            identity["dataset"] = [self.path, self.split, self._hub_version() if self.path.startswith("hf:") else ""]
        if self.format == "text":
            identity["separator"] = self.separator
        if self.format == "synthetic":
            identity["version"] = builtin.SYNTHETIC_VERSION
        return identity

    def read(
        self, after: Position = START, meter: Meter = lambda count: None
    ) -> Iterator[tuple[Position, Document | BadRecord]]:
        """Documents and unusable records with the position behind each; goes on from `after`."""
        whole = 1 if self.format in ("hf", "synthetic") else len(self.files)  # those are read as one file
        for index in range(after.file, whole):
            start = after.record if index == after.file else 0
            for number, document in self._read_file(index, start, meter):
                yield Position(index, number), document

    def _read_file(self, index: int, start: int, meter: Meter) -> Iterator[tuple[int, Document | BadRecord]]:
        if self.format == "synthetic":
            return builtin.read_synthetic(start)
        if self.format == "hf":
            return hub.read_hub_dataset(self._hub_dataset, self.path, self.text_key, start)
        file = self.files[index]
        if file.size == 0:
            return iter([(1, BadRecord(f"{file.path} is empty"))] if start < 1 else [])
        if self.format == "text":
            return text.read_text(file, self.separator, start, meter)
        if self.format == "stdlib":
            return text.read_text(file, "", start, meter, group=builtin.module_group(file.name))
        if self.format in ("docstrings", "package_docstrings"):
            return docstrings.read_documents(file, start)
        if self.format == "jsonl":
            return records.read_jsonl(file, self.text_key, start, meter)
        if self.format == "parquet":
            return records.read_parquet(file, self.text_key, start, meter)
        if self.format == "arrayrecord":
            return records.read_arrayrecord(file, self.text_key, start, meter)
        if self.format == "megatron":
            return token_files.read_megatron(file, start, meter)
        meter(file.size)
        return token_files.read_flat(file, self._flat_tokens(index), self.eos_id, self._eos_first, start)

    def _flat_tokens(self, index: int) -> np.ndarray:
        file = self.files[index]
        opener = token_files.nanogpt_tokens if self.format == "nanogpt" else token_files.llmc_tokens
        return opener(file.path, file.size)

    @functools.cached_property
    def _eos_first(self) -> bool:
        """llm.c puts the id before each document, nanoGPT after: the very first token of the first file tells."""
        first = self._flat_tokens(0)
        return len(first) > 0 and first[0] == self.eos_id

    @functools.cached_property
    def _hub_dataset(self) -> Any:
        return hub.open_hub_dataset(self.path, self.split)

    def _hub_version(self) -> list[Any]:
        """What the library knows of the data behind a name: where each file came from, rows, columns."""
        dataset = self._hub_dataset
        return [sorted(dataset.info.download_checksums or {}), len(dataset), sorted(dataset.column_names)]


def open_source(cfg: SourceConfig, validation: bool = False) -> Source:
    """The source of `cfg.path`, or of `cfg.validation_path`; a DataError where there is nothing usable."""
    path = cfg.validation_path if validation else cfg.path
    if not path:
        built_in = ", ".join(BUILT_IN)
        raise ConfigError(f"data.path is empty: give a file, folder, glob, hf:OWNER/NAME, or one of {built_in}.")
    if cfg.format not in DATA_FORMATS:
        raise ConfigError(f"data.format={cfg.format!r} is not known: choose one of {', '.join(DATA_FORMATS)}.")
    make = functools.partial(
        Source, text_key=cfg.text_key, separator=cfg.separator, split="validation" if validation else "train"
    )
    format = path if cfg.format == "auto" and path in BUILT_IN else cfg.format
    if format == "auto" and path.startswith("hf:"):
        format = "hf"
    if format == "synthetic":
        return make("synthetic", format, (InputFile("synthetic", "synthetic", builtin.SYNTHETIC_BYTES),))
    if format in ("stdlib", "docstrings", "package_docstrings"):
        found = builtin.standard_library() + (builtin.packages() if format == "package_docstrings" else [])
        files = [input_file(path, name) for path, name in found]
        return make(format, format, tuple(f for f in files if f.size))  # many an __init__.py is empty
    if format == "hf" and path.startswith("hf:"):
        return make(path, format, (InputFile(path, path),))

    files = find_files(path)
    path = os.path.expanduser(path)
    if format == "auto" and hub.is_saved_dataset(path):
        format = "hf"
    if format == "auto":
        format = _common_format(path, files)
    if format not in ("auto", "hf"):
        files = _files_of_format(path, files, format)
    return make(path, format, tuple(files))


# ------------------------------------------------------------------------------------------------ finding files


def find_files(path: str, given_by: str = "data.path (or data.validation_path)") -> list[InputFile]:
    """The files of a path, folder (all below it, hidden ones left out) or glob, sorted by name.

    Raises:
      DataError: there is none; it says to correct `given_by`.
    """
    if "://" in path:
        raise DataError(f"{path}: only files that this machine sees as local can be read; copy or mount the data.")
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        found = [(f, os.path.relpath(f, path)) for f in _walk(path)]
    elif os.path.exists(path):
        found = [(path, os.path.basename(path))]
    elif glob.has_magic(path):
        matches = [f for f in glob.glob(path, recursive=True) if os.path.isfile(f)]
        root = os.path.dirname(path[: re.search(r"[*?[]", path).start()])  # the folder before the first wildcard
        found = [(f, os.path.relpath(f, root)) for f in matches]
    else:
        raise DataError(f"{path} does not exist: correct {given_by}.")
    if not found:
        what = "is an empty folder" if os.path.isdir(path) else "matches no file"
        raise DataError(f"{path} {what}: correct {given_by}.")
    return [input_file(f, name) for f, name in sorted(found, key=lambda item: item[1].split(os.sep))]


def _walk(root: str) -> Iterator[str]:
    seen = set()  # folders by their real path, as links may form a circle
    for folder, folders, files in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [
            f
            for f in sorted(folders)
            if not f.startswith(".") and f != "__pycache__" and os.path.realpath(os.path.join(folder, f)) not in seen
        ]
        yield from (os.path.join(folder, f) for f in files if not f.startswith("."))


def input_file(path: str, name: str) -> InputFile:
    with reading(path):
        status = os.stat(path)
    return InputFile(path, name.replace(os.sep, "/"), status.st_size, status.st_mtime_ns)


# ------------------------------------------------------------------------------------------- telling the format

_ENDINGS = {
    "jsonl": r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$",
    "parquet": r"\.parquet$",
    "arrayrecord": r"\.array_?record(-\d+-of-\d+)?$",
    "nanogpt": r"\.bin$",
    "llmc": r"\.bin$",
    "megatron": r"\.bin$",
}


def _common_format(path: str, files: list[InputFile]) -> str:
    """The one format of all files; an index beside its .bin has none of its own."""
    examples: dict[str, str] = {}
    paths = {file.path for file in files}
    for file in files:
        if not file.path.endswith(".idx") or file.path.removesuffix("idx") + "bin" not in paths:
            examples.setdefault(detect_format(file.path), file.name)
    if len(examples) != 1:
        kinds = ", ".join(f"{name} ({kind})" for kind, name in examples.items())
        raise DataError(f"{path} holds files of several formats: {kinds}. Set data.format, or give a glob.")
    return next(iter(examples))


def detect_format(path: str) -> str:
    """By the name's ending; where that says too little, by the first bytes."""
    lower = path.lower()
    for format in ("jsonl", "parquet", "arrayrecord"):
        if re.search(_ENDINGS[format], lower):
            return format
    if lower.endswith((".txt", ".md", ".py")):  # not even opened, as there may be very many
        return "text"
    with reading(path), open(path, "rb") as stream:
        head = stream.read(1 << 16)
    if lower.endswith(".idx") and head.startswith(token_files.MEGATRON_MAGIC):
        return "megatron"
    if lower.endswith(".bin"):
        if os.path.exists(token_files.megatron_index(path)):
            return "megatron"
        return "llmc" if int.from_bytes(head[:4], "little") == token_files.LLMC_MAGIC else "nanogpt"
    if head.startswith(b"PAR1"):
        return "parquet"
    no_ending = "." not in os.path.basename(path)
    return "jsonl" if no_ending and _first_line_is_object(head) else "text"


def _first_line_is_object(head: bytes) -> bool:
    try:
        return isinstance(json.loads(head.split(b"\n")[0]), dict)
    except ValueError:
        return False


def _files_of_format(path: str, files: list[InputFile], format: str) -> list[InputFile]:
    """Of a folder or glob, the files whose ending fits; a single file is taken at its word."""
    if format == "megatron":  # a pair goes by the name of its .bin
        pairs = {re.sub(r"\.idx$", ".bin", f.path): re.sub(r"\.idx$", ".bin", f.name) for f in files}
        files = [input_file(pair, name) for pair, name in pairs.items()]
    if len(files) > 1 and format in _ENDINGS:
        files = [f for f in files if re.search(_ENDINGS[format], f.name.lower())]
    if not files:
        raise DataError(f"{path} holds no {format} file (names end in {_ENDINGS[format]}).")
    return files
