"""Rows of a batch as the model sees them: what each token is, what it has to predict, what that counts for."""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_jax.data.tokenizers import Tokenizer

_SEGMENT_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red")
_PADDING_STYLE = "dim"


def inspect_rows(
    rows: Iterable[Mapping[str, np.ndarray]], tokenizer: Tokenizer, count: int, console: Console | None = None
) -> None:
    """Prints the first `count` rows: their text, then a line a token. Segments are coloured on a terminal.

    Args:
      rows: features tokens, targets, segment_ids (0: padding), positions, loss_weights, each of shape (T,).
    """
    console = console or Console()
    for number, row in enumerate(itertools.islice(rows, count)):
        if number:
            console.print()
        console.print(_headline(number, row), markup=False)
        console.print(_running_text(row, tokenizer), soft_wrap=True)
        console.print(_table(row, tokenizer))


def with_targets(row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row of another task than language with what it predicts as targets: hidden tokens, or none."""
    row = dict(row)
    if "targets" not in row:
        row |= {"targets": np.zeros_like(row["tokens"]), "loss_weights": np.zeros(row["tokens"].shape, np.float32)}
        if "masked_positions" in row:
            places = row["masked_positions"][row["masked_weights"] > 0]
            row["targets"][places] = row["masked_targets"][: len(places)]
            row["loss_weights"][places] = 1
    return row


def token_text(id: int, tokenizer: Tokenizer) -> str:
    """One token as a quoted string; bytes that are no whole character as escapes; special ones by name."""
    piece = tokenizer.decode_bytes([id])
    if not piece:
        return "<eos>" if id == tokenizer.eos_id else f"<special {id}>"
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
    for index, (segment, position, token, target, weight) in enumerate(zip(*columns, strict=True)):
        cells = (index, segment, position, token, token_text(token, tokenizer), target, token_text(target, tokenizer))
        table.add_row(*(Text(str(cell), no_wrap=True) for cell in (*cells, f"{weight:g}")), style=_style(segment))
    return table


def _style(segment: int) -> str:
    return _SEGMENT_STYLES[(segment - 1) % len(_SEGMENT_STYLES)] if segment else _PADDING_STYLE
