"""Labelled records as they stand in a file: JSON lines, CSV, TSV, Parquet, or the built-in docstrings.

A record knows its file and row, so that whatever is wrong with a value can be told in one sentence: file, row, column.
Rows count as in an editor or a data frame's head: the first record of a CSV file is row 1, whatever line it is on.
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from llm_jax.config.schema import SourceConfig
from llm_jax.data.sources import docstrings, find_files, open_source
from llm_jax.data.sources.builtin import module_group
from llm_jax.data.sources.documents import InputFile, require
from llm_jax.data.sources.streams import Meter, open_stream
from llm_jax.errors import DataError

_ENDINGS = {"jsonl": r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$", "csv": r"\.csv(\.gz|\.zst)?$",
            "tsv": r"\.(tsv|tab)(\.gz|\.zst)?$", "parquet": r"\.parquet$"}  # fmt: skip
csv.field_size_limit(1 << 30)  # a context may be long


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a table. `group` decides its side of the validation split."""

    file: str
    row: int
    values: dict[str, Any]
    group: str

    def error(self, column: str, what: str, fix: str) -> DataError:
        """The sentence that says what is wrong with a value: file, row, column, what was found, what to do."""
        return DataError(f"{self.file}, row {self.row}, column {column!r}: {what}; {fix}.")

    def __getitem__(self, column: str) -> Any:
        """The value in a column. Raises DataError where the record has no such column."""
        if column not in self.values:
            there = ", ".join(map(str, list(self.values)[:12])) or "none"
            raise self.error(column, f"there is no such column, its columns are {there}",
                             "set data.columns to the names of the file")  # fmt: skip
        return self.values[column]

    def text(self, column: str) -> str:
        """The text in a column. Raises DataError where it is none, or is empty."""
        value = self[column]
        if not isinstance(value, str):
            raise self.error(column, f"{value!r:.40} ({type(value).__name__}) stands where a text belongs",
                             "correct the value, or data.columns")  # fmt: skip
        if not value.strip():
            raise self.error(column, "the text is empty", "leave the row out, or give it a text")
        return self.sound(column, value)

    def sound(self, column: str, text: str) -> str:
        """`text` of a column. Raises DataError where it holds half of a surrogate pair, which no tokenizer can read."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self.error(column, f"{text!r:.40} holds half of a surrogate pair, which is no character",
                             "write the whole character, or leave it out")  # fmt: skip
        return text


def read_table(source: SourceConfig, validation: bool = False, meter: Meter = lambda count: None) -> Iterator[Record]:
    """The records of a source's files, in a fixed order; `meter` is told the bytes that are read.

    Raises:
      DataError: a file cannot be read, or a row of it is no record.
    """
    path = source.validation_path if validation else source.path
    if "docstrings" in (source.format, path):
        for file in open_source(dataclasses.replace(source, path="docstrings", format="auto")).files:
            for number, values in docstrings.read_records(file):
                yield Record(file.path, number, values, module_group(file.name))
        return
    found = False
    for file in find_files(path):
        for number, values in read_file(file, source.format, meter):
            found = True
            yield Record(file.path, number, values, f"{file.name}:{number}")
    if not found:
        raise DataError(f"{path} holds no record: give a file with at least one row below its header.")


def read_file(
    file: InputFile, format: str = "auto", meter: Meter = lambda count: None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, values by column), rows from 1 on. Raises DataError where the file or a row is unsound."""
    if format == "auto":
        format = next((name for name, ending in _ENDINGS.items() if re.search(ending, file.path.lower())), "")
    if format == "jsonl":
        return _read_jsonl(file.path, meter)
    if format in ("csv", "tsv"):
        return _read_csv(file.path, "," if format == "csv" else "\t", meter)
    if format == "parquet":
        meter(file.size)
        return _read_parquet(file.path)
    fix = "name it .jsonl, .csv, .tsv or .parquet, or set data.format"
    raise DataError(f"{file.path} is not known to be a table: {fix}.")


def _read_jsonl(path: str, meter: Meter) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_stream(path, meter) as stream:
        for row, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
            except (UnicodeDecodeError, ValueError, RecursionError) as error:
                place = f"{error.msg} at character {error.pos + 1}" if hasattr(error, "pos") else error
                raise DataError(f"{path}, row {row}: this is not JSON ({place}); write one object a line.") from None
            if not isinstance(values, dict):
                raise DataError(f"{path}, row {row}: a JSON {type(values).__name__} stands where an object belongs; "
                                "write one object a line.")  # fmt: skip
            yield row, values


def _read_csv(path: str, delimiter: str, meter: Meter) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first line names the columns. In TSV files quotes are ordinary characters, as in GLUE's."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    row = 0
    with open_stream(path, meter) as stream:
        decoded = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(stream))
        lines = (line for lines in decoded for line in io.StringIO(lines, newline=""))  # some end in a \r alone
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            header = next(reader, [])
            if twice := [name for place, name in enumerate(header) if name in header[:place]]:
                raise DataError(f"{path}: two columns are named {twice[0]!r}; give each a name of its own.")
            for cells in filter(None, reader):
                row += 1
                if len(cells) != len(header):
                    raise DataError(f"{path}, row {row}: {len(cells)} values stand below {len(header)} columns "
                                    f"({', '.join(header)}); quote what holds a delimiter.")  # fmt: skip
                yield row, dict(zip(header, cells, strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            where = f"row {row + 1}" if reader.line_num else "its first line"
            raise DataError(f"{path}, {where}: this is no row of a UTF-8 table ({error}); save the file as UTF-8, and "
                            "close every quote.") from None  # fmt: skip


def _read_parquet(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    pyarrow = require("pyarrow", "data", f"Reading {path}")
    parquet = require("pyarrow.parquet", "data", f"Reading {path}")
    try:
        with parquet.ParquetFile(path) as table:
            row = 0
            for batch in table.iter_batches(1024):
                for values in batch.to_pylist():
                    row += 1
                    yield row, values
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or not a Parquet file ({error}): fetch or write it again.") from error
