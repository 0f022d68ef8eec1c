"""From the model's scores back to records: what is predicted for each, and how good that is."""

from typing import Any

import numpy as np

from llm_jax.config.schema import DataConfig
from llm_jax.data import questions
from llm_jax.data.labelled import UNLABELLED, Examples, texts_a_record
from llm_jax.data.text_pieces import Pieces
from llm_jax.metrics import scores

Batch = dict[str, np.ndarray]


def by_text(batches: list[Batch], examples: Examples, of_tokens: bool) -> dict[int, np.ndarray]:
    """The scores of each text that has some, by its number, ascending.

    Args:
      batches: "scores" (B, S, L) of texts or (B, T, L) of tokens, "text_ids" and "starts" (B, S).

    Returns:
      (L,) a text, or (pieces, L).
    """
    found: dict[int, np.ndarray] = {}
    lengths = examples.lengths
    for batch in batches:
        for row, slot in zip(*np.nonzero(batch["text_ids"] >= 0), strict=True):
            text, start = int(batch["text_ids"][row, slot]), int(batch["starts"][row, slot])
            one = batch["scores"][row]
            found[text] = one[start : start + lengths[text]] if of_tokens else one[slot]
    return dict(sorted(found.items()))


def measures(cfg: DataConfig, names: tuple[str, ...], examples: Examples, batches: list[Batch]) -> dict[str, float]:
    """The task's figures besides loss and accuracy, over the texts that were scored."""
    per_text = by_text(batches, examples, cfg.task in ("tokens", "questions"))
    if not per_text:
        return {}
    texts = np.array(list(per_text))
    match cfg.task:
        case "classification":
            found = np.stack(list(per_text.values())).argmax(-1)
            return scores.classification(examples.labels[texts], found, len(names))
        case "multilabel":
            return scores.multilabel(examples.labels[texts], np.stack(list(per_text.values())) > 0)
        case "regression":
            found, truth = np.stack(list(per_text.values()))[:, 0], examples.labels[texts, 0]
            return {"pearson": scores.pearson(found, truth), "spearman": scores.spearman(found, truth)}
        case "tokens":
            return scores.entity_f1(*token_names(names, examples, per_text))
        case "questions":
            return answer_measures(cfg, examples, per_text)
    return {}


def token_names(
    names: tuple[str, ...], examples: Examples, per_text: dict[int, np.ndarray]
) -> tuple[list[list[str]], list[list[str]]]:
    """The true and the predicted labels of each text's words."""
    truth, found = [], []
    for text, logits in per_text.items():
        labels = examples.labels[examples.offsets[text] : examples.offsets[text + 1]]
        words = labels != UNLABELLED
        truth.append([names[label] for label in labels[words]])
        found.append([names[label] for label in logits.argmax(-1)[words]])
    return truth, found


def answer_measures(cfg: DataConfig, examples: Examples, per_text: dict[int, np.ndarray]) -> dict[str, float]:
    """Over the questions all of whose windows were scored."""
    windows = np.bincount(examples.record, minlength=len(examples.records))
    scored = np.bincount(examples.record[list(per_text)], minlength=len(examples.records))
    pairs = []
    for record, found in answers(cfg, examples, per_text).items():
        if scored[record] == windows[record]:
            truths = [text for _, text in questions.answers_of(examples.records[record], cfg.columns)]
            pairs.append((found["answer"], truths))
    if not pairs:
        return {}
    return {
        "exact_match": float(np.mean([questions.exact_match(*pair) for pair in pairs])),
        "f1": float(np.mean([questions.overlap_f1(*pair) for pair in pairs])),
    }


def answers(cfg: DataConfig, examples: Examples, per_text: dict[int, np.ndarray]) -> dict[int, dict[str, Any]]:
    """The best answer of each record that has scored windows."""
    by_record: dict[int, list[tuple[np.ndarray, Pieces]]] = {}
    for text, logits in per_text.items():
        by_record.setdefault(int(examples.record[text]), []).append((logits, examples.pieces[text]))
    context = lambda record: examples.records[record].text(cfg.columns.pair)  # noqa: E731
    return {r: questions.best_answer(windows, context(r), cfg.answer_length) for r, windows in by_record.items()}


def predictions(
    cfg: DataConfig, names: tuple[str, ...], examples: Examples, batches: list[Batch]
) -> list[dict[str, Any]]:
    """What is predicted for each record, JSON-able.

    classification  "label", "score" (its probability) and "scores" of all labels
    multilabel      "labels" (those above 1/2) and "scores"
    regression      "value"
    choice          "choice" and "scores", probabilities
    tokens          "labels" and "scores", one a word (fewer where the row's end cut the text off)
    questions       "answer", "score", "start", "end"
    similarity      "similarity" (cosine) of the text and its pair; of a text alone its "embedding", of length 1
    """
    per_text = by_text(batches, examples, cfg.task in ("tokens", "questions"))
    if cfg.task == "questions":
        return list(answers(cfg, examples, per_text).values())
    if cfg.task == "tokens":
        return [word_labels(names, logits, examples.pieces[text]) for text, logits in per_text.items()]
    stacked = np.stack(list(per_text.values()))
    grouped = stacked.reshape(-1, texts_a_record(cfg), stacked.shape[-1])
    return [one_prediction(cfg.task, names, logits.astype(np.float64)) for logits in grouped]


def one_prediction(task: str, names: tuple[str, ...], logits: np.ndarray) -> dict[str, Any]:
    """Of one record's (texts, L) scores."""
    match task:
        case "classification":
            shares = softmax(logits[0])
            best = int(shares.argmax())
            table = dict(zip(names, rounded(shares), strict=True))
            return {"label": names[best], "score": table[names[best]], "scores": table}
        case "multilabel":
            table = dict(zip(names, rounded(1 / (1 + np.exp(-logits[0]))), strict=True))
            return {"labels": [name for name, share in table.items() if share > 0.5], "scores": table}
        case "regression":
            return {"value": float(logits[0, 0])}
        case "choice":
            shares = softmax(logits[:, 0])
            return {"choice": int(shares.argmax()), "scores": rounded(shares)}
    unit = logits / np.maximum(np.linalg.norm(logits, axis=-1, keepdims=True), 1e-12)
    if len(unit) == 1:
        return {"embedding": [round(number, 7) for number in unit[0].tolist()]}
    return {"similarity": float(unit[0] @ unit[1])}


def word_labels(names: tuple[str, ...], logits: np.ndarray, pieces: Any) -> dict[str, Any]:
    """The label of each word, told at its first piece."""
    labels, shares = [], []
    first = (pieces.words >= 0) & (np.diff(pieces.words, prepend=-1) != 0)
    for row in logits[first].astype(np.float64):
        share = softmax(row)
        labels.append(names[int(share.argmax())])
        shares.append(round(float(share.max()), 6))
    return {"labels": labels, "scores": shares}


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max())
    return grown / grown.sum()


def rounded(shares: np.ndarray) -> list[float]:
    return [round(float(share), 6) for share in shares]
