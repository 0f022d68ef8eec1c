"""Extractive question answering: windows on a context, where an answer lies in them, and the best span back as text.

As in SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250; 2018, arXiv 1806.03822): a question without an answer points at
the first token, and so does a window that does not hold the whole answer.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.config.schema import ColumnsConfig
from llm_jax.data.tables import Record
from llm_jax.data.text_pieces import Pieces, TextEncoder


def answers_of(record: Record, columns: ColumnsConfig) -> list[tuple[int, str]]:
    """(first character, text) of each answer; none where the context does not hold one.

    A column of answers is SQuAD's {"text": [...], "answer_start": [...]}.
    """
    value, column = record[columns.label], columns.label
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
    else:
        texts = starts = None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise record.error(column, f"{value!r:.60} is not of the form {{'text': [...], 'answer_start': [...]}}",
                           "write answers as SQuAD does, with empty lists where there is none")  # fmt: skip
    context = record.text(columns.pair)
    for start, text in zip(starts, texts, strict=True):
        sound = type(start) is int and start >= 0 and isinstance(text, str) and text
        if not sound or context[start : start + len(text)] != text:
            raise record.error(column, f"the answer {text!r:.60} does not stand at character {start} of the context",
                               "correct answer_start; it counts characters from 0")  # fmt: skip
    return list(zip(starts, texts, strict=True))


def windows(
    records: Sequence[Record], columns: ColumnsConfig, encoder: TextEncoder, labelled: bool
) -> tuple[list[Pieces], list[int], np.ndarray | None]:
    """The windows of all records, the record of each, and (windows, 2) int32 the first and last piece of the answer."""
    texts, owner, labels = [], [], []
    for number, record in enumerate(records):
        question, context = record.text(columns.text), record.text(columns.pair)
        answers = answers_of(record, columns) if labelled else []
        try:
            found = encoder.windows(question, context)
        except Exception:  # the library raises bare Exceptions
            raise record.error(columns.text, f"the question alone fills a row of {encoder.length} tokens",
                               "raise data.sequence_length, or shorten it") from None  # fmt: skip
        if not any((window.sequence == 1).any() for window in found):
            raise record.error(columns.pair, "the tokenizer leaves nothing of the context",
                               "leave the row out, or give it a context")  # fmt: skip
        texts += found
        owner += [number] * len(found)
        labels += [place_of(window, answers[0]) if answers else (0, 0) for window in found]
    return texts, owner, np.array(labels, np.int32).reshape(-1, 2) if labelled else None


def place_of(window: Pieces, answer: tuple[int, str]) -> tuple[int, int]:
    """The pieces of a window at which an answer begins and ends; (0, 0) where it lies outside."""
    first, last = answer[0], answer[0] + len(answer[1])
    context = window.sequence == 1
    begins = np.flatnonzero(context & (window.spans[:, 0] <= first) & (window.spans[:, 1] > first))
    ends = np.flatnonzero(context & (window.spans[:, 0] < last) & (window.spans[:, 1] >= last))
    return (int(begins[0]), int(ends[-1])) if begins.size and ends.size else (0, 0)


def best_span(scores: np.ndarray, window: Pieces, longest: int) -> tuple[float, int, int]:
    """The best answer in a window.

    Args:
      scores: (pieces, 2) logits of an answer's first and last piece.
      longest: pieces of an answer, at most.

    Returns:
      The sum of its two logits, and its first and last character in the context.
    """
    inside = np.flatnonzero(window.sequence == 1)
    if not inside.size:
        return -np.inf, 0, 0
    gap = inside[None, :] - inside[:, None]
    total = np.where((gap >= 0) & (gap < longest), scores[inside, 0][:, None] + scores[inside, 1], -np.inf)
    first, last = np.unravel_index(int(total.argmax()), total.shape)
    return float(total[first, last]), int(window.spans[inside[first], 0]), int(window.spans[inside[last], 1])


def best_answer(windows: Sequence[tuple[np.ndarray, Pieces]], context: str, longest: int) -> dict[str, Any]:
    """{"answer", "score", "start", "end"}: the best span over a question's windows, each (pieces, 2) logits and pieces.

    "score" is the span's logits less those of no answer, which are the lowest over the windows (one that holds the
    answer denies that there is none); the answer is "" where it is not above 0.
    """
    total, start, end = max(best_span(scores, window, longest) for scores, window in windows)
    score = total - min(float(scores[0].sum()) for scores, _ in windows)
    if score <= 0:
        return {"answer": "", "score": score, "start": None, "end": None}
    return {"answer": context[start:end], "score": score, "start": start, "end": end}


# ---------------------------------------------------------------------------------- SQuAD's two figures


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and superfluous blanks, as SQuAD's evaluation compares answers."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is one of the truths (none: where it is empty)."""
    return float(any(normalized(answer) == normalized(truth) for truth in truths or [""]))


def overlap_f1(answer: str, truths: Sequence[str]) -> float:
    """The largest F1 of the words of the answer and of a truth."""
    return max(_overlap(normalized(answer).split(), normalized(truth).split()) for truth in truths or [""])


def _overlap(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))
