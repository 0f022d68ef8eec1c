"""Data sets of the Hugging Face `datasets` library: on the hub, saved to disk, or a local folder it can load."""

import os
from typing import Any

from llm_jax.data.sources.documents import require
from llm_jax.data.sources.records import Records, value_document
from llm_jax.errors import DataError

_BLOCK = 1024  # rows read at once


def open_hub_dataset(path: str, split: str) -> Any:
    """The `datasets.Dataset` of "hf:owner/name", "hf:owner/name:config", "hf:owner/name:config:split" or a folder.

    `split` is taken where the path names none. A folder is what `save_to_disk` wrote, or one that `load_dataset` reads.
    """
    datasets = require("datasets", "hf", f"Reading {path}")
    name, _, rest = path.removeprefix("hf:").partition(":") if path.startswith("hf:") else (path, "", "")
    config, _, named_split = rest.partition(":")
    split = named_split or split
    try:
        if is_saved_dataset(name):
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[split]
        else:
            dataset = datasets.load_dataset(name, config or None, split=split)
    except KeyError as error:
        raise DataError(f"{path} has no split {split!r}; the name may end in :CONFIG:SPLIT.") from error
    except Exception as error:  # the library raises its own, the network's and pandas' classes
        raise DataError(f"{path} could not be loaded (split {split!r}): {type(error).__name__}: {error}") from error
    return dataset


def is_saved_dataset(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, f)) for f in ("state.json", "dataset_dict.json"))


def read_hub_dataset(dataset: Any, path: str, text_key: str, start: int) -> Records:
    """A record is a row."""
    if text_key not in dataset.column_names:
        raise DataError(f"{path} has no column {text_key!r} but {', '.join(dataset.column_names)}: set data.text_key.")
    column = dataset.select_columns([text_key])
    for first in range(start, len(column), _BLOCK):
        for number, value in enumerate(column[first : first + _BLOCK][text_key], first + 1):
            yield number, value_document(value, text_key, f"{path}:{number}", str(number))
