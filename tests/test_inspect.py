"""`llm-jax data inspect`: each row as the model sees it."""

import os

import numpy as np
from rich.console import Console

from llm_jax.data.inspect import inspect_rows
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
