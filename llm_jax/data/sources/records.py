"""Files of records: JSON lines, Parquet, ArrayRecord. One field of a record is the document's text."""

import json
from collections.abc import Iterator
from typing import Any

from llm_jax.data.sources.documents import BadRecord, Document, InputFile, checked_text, require, text_document
from llm_jax.data.sources.streams import Meter, open_stream, reading
from llm_jax.errors import DataError

Records = Iterator[tuple[int, Document | BadRecord]]  # record numbers count from 1, in file order

_BLOCK = 1024  # records read at once


def value_document(value: Any, text_key: str, id: str, group: str) -> Document | BadRecord:
    """The document of a field's value."""
    if isinstance(value, str):
        return checked_text(value, id, group)
    if isinstance(value, bytes):
        return text_document(value, id, group)
    return BadRecord(f"{id} has {value!r:.40} ({type(value).__name__}) in field {text_key!r} where a string belongs")


# ------------------------------------------------------------------------------------------------ JSON lines


def read_jsonl(file: InputFile, text_key: str, start: int, meter: Meter) -> Records:
    """A record is a line; blank lines are passed over."""
    with open_stream(file.path, meter) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                if line.lstrip().startswith(b"["):
                    raise DataError(f"{file.path} holds a JSON array: write one record a line (JSON lines).")
            if number > start and line.strip():
                yield number, json_document(line, text_key, f"{file.path}:{number}", f"{file.name}:{number}")


def json_document(line: bytes, text_key: str, id: str, group: str) -> Document | BadRecord:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(f"{id} is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the record")
    except (ValueError, RecursionError) as error:
        return BadRecord(f"{id} is not JSON ({error})")
    if not isinstance(record, dict):
        return BadRecord(f"{id} is a JSON {type(record).__name__}, not an object with a field {text_key!r}")
    if text_key not in record:
        fields = ", ".join(list(record)[:10]) or "none"
        return BadRecord(f"{id} has no field {text_key!r} (its fields: {fields}; data.text_key names the right one)")
    return value_document(record[text_key], text_key, id, group)


# --------------------------------------------------------------------------------------------------- Parquet


def read_parquet(file: InputFile, text_key: str, start: int, meter: Meter) -> Records:
    """A record is a row."""
    pyarrow = require("pyarrow", "data", f"Reading {file.path}")
    parquet = require("pyarrow.parquet", "data", f"Reading {file.path}")
    try:
        with parquet.ParquetFile(file.path) as table:
            if text_key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise DataError(f"{file.path} has no column {text_key!r} but {columns}: set data.text_key.")
            number = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                meter(int(file.size * rows / max(table.metadata.num_rows, 1)))
                if number + rows <= start:
                    number += rows
                    continue
                for batch in table.iter_batches(_BLOCK, row_groups=[group], columns=[text_key]):
                    for scalar in batch.column(0):
                        number += 1
                        if number > start:
                            id = f"{file.path}:{number}"
                            yield number, _parquet_document(scalar, text_key, id, f"{file.name}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path} is damaged or not a Parquet file ({error}): fetch or write it again.") from error


def _parquet_document(scalar, text_key: str, id: str, group: str) -> Document | BadRecord:
    try:
        return value_document(scalar.as_py(), text_key, id, group)
    except UnicodeDecodeError as error:  # Parquet does not check its strings
        return BadRecord(f"{id} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}")


# ----------------------------------------------------------------------------------------------- ArrayRecord


def read_arrayrecord(file: InputFile, text_key: str, start: int, meter: Meter) -> Records:
    """A record is UTF-8 text, or, where a file's first record is a JSON object, JSON with a text field."""
    library = require("array_record.python.array_record_module", "data", f"Reading {file.path}")
    foreign = DataError(f"{file.path} is cut short or not an ArrayRecord file: fetch or write it again.")
    with reading(file.path):
        open(file.path, "rb").close()  # the library's own message for this is unreadable
    try:
        records = library.ArrayRecordReader(file.path)
        if not records.ok():
            raise foreign
        count = records.num_records()
        is_json = count > 0 and _is_json_object(records.read([0])[0])
        for first in range(start, count, _BLOCK):
            block = records.read(first, min(first + _BLOCK, count))
            if not records.ok() or len(block) != min(_BLOCK, count - first):
                raise DataError(f"{file.path} is damaged between records {first + 1} and {first + _BLOCK}.")
            meter(file.size * len(block) // count)
            for number, raw in enumerate(block, first + 1):
                id, group = f"{file.path}:{number}", f"{file.name}:{number}"
                document = json_document(raw, text_key, id, group) if is_json else text_document(raw, id, group)
                yield number, document
        records.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise foreign from error


def _is_json_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False
