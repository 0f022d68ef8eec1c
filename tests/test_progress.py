"""Progress of preparing data: plain lines at intervals, a bar on a terminal."""

import sys
import time

from llm_jax.data.progress import Progress


def test_plain_progress_lines(monkeypatch):
    clock = iter([0.0, 1.0, 12.0, 13.0, 24.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines = []
    with Progress(lines.append).counting("data", 4_000_000) as advance:
        for _ in range(4):
            advance(1_000_000, 30)
    assert lines == [
        "data: 2.0 MB (50%), 60 documents, 5 documents/s",
        "data: 4.0 MB (100%), 120 documents, 5 documents/s",
    ]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress()
    with progress.counting("data", 0) as advance:
        advance(10, 1)
    assert progress._bars
