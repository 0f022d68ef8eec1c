"""Rows of a batch as the model sees them: what each token is, what it has to predict, what that counts for."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_jax.config.schema import MASKED_TASKS
from llm_jax.data.tokenizers import Tokenizer

_SEGMENT_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red")
_PADDING_STYLE = "dim"


def inspect_rows(
    rows: Iterable[Mapping[str, np.ndarray]], tokenizer: Tokenizer, count: int, console: Console | None = None
) -> None:
    """Prints the first `count` rows: their text, then a line a token. Segments are coloured on a terminal.

    Args:
      rows: features tokens, targets, segment_ids (0: padding), positions, loss_weights, each of shape (T,). "told" may
        be lines about the row, and "target_names" what stands for the targets' tokens.
    """
    console = console or Console()
    for number, row in enumerate(itertools.islice(rows, count)):
        if number:
            console.print()
        console.print(_headline(number, row), markup=False)
        console.print(_running_text(row, tokenizer), soft_wrap=True)
        for line in row.get("told", ()):
            console.print(line, markup=False, highlight=False)
        console.print(_table(row, tokenizer))


def with_targets(row: Mapping[str, Any], task: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """A row of another task than language with what it predicts: of tokens as targets, of texts as lines ("told").

    Args:
      task: of data.task.
      names: of the labels.
    """
    row = dict(row)
    if "targets" in row:
        return row
    row |= {"targets": np.zeros_like(row["tokens"]), "loss_weights": np.zeros(row["tokens"].shape, np.float32)}
    if task in MASKED_TASKS:
        places = row["masked_positions"][row["masked_weights"] > 0]
        row["targets"][places] = row["masked_targets"][: len(places)]
        row["loss_weights"][places] = 1
        pairs = row["pair_labels"][row["pair_weights"] > 0]
        row["told"] = [f"pair {n}: {('its second part follows', 'its second part is random')[p]}"
                       for n, p in enumerate(pairs.tolist(), 1)]  # fmt: skip
        return row
    if task == "tokens":
        row["targets"], row["loss_weights"] = np.maximum(row["labels"], 0), (row["labels"] >= 0).astype(np.float32)
        row["target_names"] = [names[label] if label >= 0 else "" for label in row["labels"].tolist()]
        return row
    there = np.flatnonzero(row["text_ids"] >= 0).tolist()
    labels = row.get("labels", np.zeros(len(row["text_ids"])))
    row["told"] = [f"text {slot + 1}: {_label(labels[slot], task, names)}" for slot in there]
    row["target_names"] = [""] * len(row["tokens"])
    return row


def _label(label: Any, task: str, names: Sequence[str]) -> str:
    """What is to be predicted of a text, in words."""
    match task:
        case "classification":
            return f"label {names[label]!r}"
        case "multilabel":
            return f"labels {[name for name, there in zip(names, label, strict=True) if there]}"
        case "regression":
            return f"value {float(label[0]):g}"
        case "questions":
            first, last = label.tolist()
            return f"the answer stands at indices {first} to {last}, which is nowhere where they are the text's first"
        case "choice":
            return f"choice {label} of its record is right"
    return "the texts of one record belong together"


def token_text(id: int, tokenizer: Tokenizer) -> str:
    """One token as a quoted string; bytes that are no whole character as escapes; special ones by name."""
    piece = tokenizer.decode_bytes([id])
    if not piece:
        names = {id: name for name, id in getattr(tokenizer, "special_ids", {}).items()}
        return names.get(id) or ("<eos>" if id == tokenizer.eos_id else f"<special {id}>")
    return repr(piece.decode("utf-8", "backslashreplace")).replace(r"\\x", r"\x")


def _headline(number: int, row: Mapping[str, np.ndarray]) -> str:
    segments = row["segment_ids"]
    padding = int((segments == 0).sum())
    documents = len(np.unique(segments[segments > 0]))
    weight = float(np.sum(row["loss_weights"]))
    return f"row {number}: {len(segments)} tokens, {documents} segments, {padding} padding, loss weight {weight:g}"


def _running_text(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> Text:
    text = Text()
    segments = row["segment_ids"]
    borders = np.flatnonzero(np.diff(segments)) + 1
    for ids, segment in zip(np.split(row["tokens"], borders), segments[np.r_[0, borders]], strict=True):
        if segment:
            text.append(tokenizer.decode(ids.tolist()), _style(segment))
            text.append("|", "bold")
    return text


def _table(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> Table:
    table = Table("index", "segment", "position", "id", "token", "target id", "target", "weight", box=None)
    columns = (row[name].tolist() for name in ("segment_ids", "positions", "tokens", "targets", "loss_weights"))
    targets = row.get("target_names") or [token_text(target, tokenizer) for target in row["targets"].tolist()]
    for index, (segment, position, token, target, weight) in enumerate(zip(*columns, strict=True)):
        cells = (index, segment, position, token, token_text(token, tokenizer), target, targets[index])
        table.add_row(*(Text(str(cell), no_wrap=True) for cell in (*cells, f"{weight:g}")), style=_style(segment))
    return table


def _style(segment: int) -> str:
    return _SEGMENT_STYLES[(segment - 1) % len(_SEGMENT_STYLES)] if segment else _PADDING_STYLE
