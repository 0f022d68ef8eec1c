"""`llm-jax data inspect`: each row as the model sees it."""

import os

import numpy as np
import pytest
from rich.console import Console

from llm_jax.data.inspect import inspect_rows, with_targets
from llm_jax.data.tokenizers import ByteTokenizer


def test_inspect_rows_shows_every_feature():
    row = {
        "tokens": np.array([104, 105, 256, 0xC3, 0, 0]),
        "targets": np.array([105, 256, 0, 0xA9, 0, 0]),
        "segment_ids": np.array([1, 1, 1, 2, 0, 0]),
        "positions": np.array([0, 1, 2, 0, 0, 0]),
        "loss_weights": np.array([1, 1, 0, 0.5, 0, 0]),
    }
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=120, file=nowhere)
        inspect_rows([row] * 5, ByteTokenizer(), 2, console)
    text = console.export_text()
    assert text.count("6 tokens, 2 segments, 2 padding, loss weight 2.5") == 2
    assert "hi|" in text
    cells = [line.split() for line in text.splitlines()]
    assert ["1", "1", "1", "105", "'i'", "256", "<eos>", "1"] in cells
    assert ["3", "2", "0", "195", "'\\xc3'", "169", "'\\xa9'", "0.5"] in cells


WHOLE = {"tokens": np.arange(4), "text_ids": np.array([5, -1])}
HIDDEN = dict(
    tokens=np.arange(4), masked_positions=np.array([2, 0]), masked_targets=np.array([9, 0]),
    masked_weights=np.array([1.0, 0.0]), pair_labels=np.array([1, 0]), pair_weights=np.array([1.0, 0.0]),
)  # fmt: skip


@pytest.mark.parametrize(
    "task, labels, told",
    [
        ("classification", np.array([1, 0]), "text 1: label 'y'"),
        ("multilabel", np.array([[0.0, 1.0], [0.0, 0.0]]), "text 1: labels ['y']"),
        ("regression", np.array([[0.5], [0.0]]), "text 1: value 0.5"),
        ("choice", np.array([1, 0]), "text 1: choice 1 of its record is right"),
        ("similarity", None, "text 1: the texts of one record belong together"),
    ],
)
def test_what_is_to_be_predicted_of_a_text_is_told(task, labels, told):
    row = WHOLE if labels is None else WHOLE | {"labels": labels}
    assert with_targets(row, task, ("x", "y"))["told"] == [told]


def test_what_is_to_be_predicted_of_tokens_is_told():
    row = with_targets(WHOLE | {"labels": np.array([-1, 1, 0, -1])}, "tokens", ("x", "y"))
    assert row["target_names"] == ["", "y", "x", ""] and row["loss_weights"].tolist() == [0, 1, 1, 0]
    for task in ("masked", "replaced"):
        row = with_targets(HIDDEN, task)
        assert row["targets"].tolist() == [0, 0, 9, 0] and row["loss_weights"].tolist() == [0, 0, 1, 0]
        assert row["told"] == ["pair 1: its second part is random"]
    place = with_targets(WHOLE | {"labels": np.array([[1, 2], [0, 0]])}, "questions")["told"]
    assert place[0].startswith("text 1: the answer stands at indices 1 to 2")
