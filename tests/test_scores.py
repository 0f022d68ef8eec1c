"""Figures of predictions against values of scikit-learn 1.7, SciPy 1.16 and seqeval 1.2, and by hand."""

import numpy as np
import pytest

from llm_jax.metrics import scores

TRUTH = np.array([0, 1, 2, 2, 1, 0, 0, 2, 1, 1])
FOUND = np.array([0, 2, 2, 2, 1, 0, 1, 0, 1, 1])


def test_classification():
    got = scores.classification(TRUTH, FOUND, 3)
    assert got == pytest.approx({"accuracy": 0.7, "f1_micro": 0.7, "f1_macro": 0.6944444444, "matthews": 0.5454545455})


def test_two_classes_have_an_f1_of_the_second():
    truth, found = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    got = scores.classification(truth, found, 2)
    assert got["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert got["matthews"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))


def test_a_class_that_never_occurs_counts_in_no_mean():
    got = scores.classification(np.array([0, 0]), np.array([0, 0]), 5)
    assert got["f1_macro"] == got["accuracy"] == 1.0
    assert got["matthews"] == 0.0


def test_multilabel():
    truth = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0]])
    found = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    got = scores.multilabel(truth, found)
    assert got == pytest.approx({"f1_micro": 2 * 3 / (3 + 5), "f1_macro": (1 + 2 / 3 + 0) / 3, "exact_match": 1 / 3})


def test_correlations():
    a, b = np.array([1.0, 2.0, 2.0, 4.0, 5.0]), np.array([2.0, 1.0, 3.0, 3.0, 8.0])
    assert scores.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert scores.mean_ranks(a).tolist() == [1, 2.5, 2.5, 4, 5]
    assert scores.spearman(a, b) == pytest.approx(0.7631578947)
    assert scores.spearman(a, np.exp(a)) == pytest.approx(1)
    assert scores.pearson(a, np.ones(5)) == 0.0


@pytest.mark.parametrize(
    "labels, found",
    [
        (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 1), ("LOC", 3, 3)}),
        (["B-PER", "B-PER", "I-PER"], {("PER", 0, 0), ("PER", 1, 2)}),
        (["I-PER", "I-LOC", "O"], {("PER", 0, 0), ("LOC", 1, 1)}),  # IOB1, or a model's slip
        (["O", "I-PER", "B-PER"], {("PER", 1, 1), ("PER", 2, 2)}),
        (["B-A", "I-A", "E-A", "S-B", "S-B"], {("A", 0, 2), ("B", 3, 3), ("B", 4, 4)}),
        (["noun", "noun", "verb"], {("noun", 0, 1), ("verb", 2, 2)}),
        ([], set()),
    ],
)
def test_entities(labels, found):
    assert scores.entities(labels) == found


def test_entity_f1():
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    found = [["B-PER", "I-PER", "O", "O"], ["B-ORG", "I-ORG"]]
    assert scores.entity_f1(truth, found) == pytest.approx({"precision": 0.5, "recall": 1 / 3, "f1": 0.4})
