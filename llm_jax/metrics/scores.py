"""How good predictions are: accuracy, F1, Matthews, Pearson, Spearman and entity F1, in float64.

Few lines each, and held against scikit-learn's, SciPy's and seqeval's values in the tests: those libraries would be the
largest dependencies of the package.
"""

from collections.abc import Sequence

import numpy as np


def confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) int64: row truth, column prediction."""
    return np.bincount(truth * classes + found, minlength=classes**2).reshape(classes, classes)


def f1_scores(true_positives: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """2 TP / (predicted + actual), elementwise; 0 where there is nothing to find and nothing was found."""
    return 2 * true_positives / np.maximum(predicted + actual, 1)


def classification(truth: np.ndarray, found: np.ndarray, classes: int) -> dict[str, float]:
    """Of (n,) class ids.

    Returns:
      "accuracy" (which is the micro F1), "f1_macro" (over the classes that occur in either), "matthews" and, of two
      classes, "f1" of the second.
    """
    table = confusion(truth, found, classes)
    actual, predicted, right = table.sum(1), table.sum(0), np.diag(table)
    by_class = f1_scores(right, predicted, actual)
    result = {
        "accuracy": float(right.sum() / max(table.sum(), 1)),
        "f1_micro": float(right.sum() / max(table.sum(), 1)),
        "f1_macro": float(by_class[(actual + predicted) > 0].mean()) if table.sum() else 0.0,
        "matthews": matthews(table),
    }
    return result | ({"f1": float(by_class[1])} if classes == 2 else {})


def matthews(table: np.ndarray) -> float:
    """Matthews' correlation of a confusion matrix, for any number of classes (Gorodkin 2004); 0 where it has none."""
    table = table.astype(np.float64)
    total, right, actual, predicted = table.sum(), np.trace(table), table.sum(1), table.sum(0)
    covariance = right * total - actual @ predicted
    spread = np.sqrt(total**2 - predicted @ predicted) * np.sqrt(total**2 - actual @ actual)
    return float(covariance / spread) if spread > 0 else 0.0


def multilabel(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Of (n, labels) zeros and ones: "f1_micro", "f1_macro" (over all labels) and "exact_match" of whole rows."""
    truth, found = truth > 0, found > 0
    right, predicted, actual = (truth & found).sum(0), found.sum(0), truth.sum(0)
    return {
        "f1_micro": float(f1_scores(right.sum(), predicted.sum(), actual.sum())),
        "f1_macro": float(f1_scores(right, predicted, actual).mean()),
        "exact_match": float((truth == found).all(1).mean()),
    }


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two (n,) arrays; 0 where one of them is constant."""
    a, b = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean(dtype=np.float64)
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks; equal values share their mean rank."""
    return pearson(mean_ranks(a), mean_ranks(b))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


# ------------------------------------------------------------------------------------------------- entities


def entities(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first, last) of the entities that labels such as B-PER, I-PER, O tell, as CoNLL's script reads them.

    Labels without a prefix are their own kind. I- after another kind, or after O, begins an entity.
    """
    found, kind, first = set(), "", 0
    for place, label in enumerate([*labels, "O"]):
        prefix, _, name = label.partition("-") if label[1:2] == "-" and label[0] in "BIES" else ("I", "", label)
        outside = label in ("O", "")
        if kind and (outside or prefix in "BS" or name != kind):
            found.add((kind, first, place - 1))
            kind = ""
        if not outside and not kind:
            kind, first = name, place
        if not outside and prefix in "ES":
            found.add((kind, first, place))
            kind = ""
    return found


def entity_f1(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """ "precision", "recall" and "f1" of whole entities over all texts: kind and both ends must be right."""
    right = predicted = actual = 0
    for one, other in zip(truth, found, strict=True):
        true, guessed = entities(one), entities(other)
        right, predicted, actual = right + len(true & guessed), predicted + len(guessed), actual + len(true)
    f1 = float(f1_scores(np.array(right), np.array(predicted), np.array(actual)))
    return {"precision": right / max(predicted, 1), "recall": right / max(actual, 1), "f1": f1}
