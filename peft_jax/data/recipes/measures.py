"""Metrics over a set of predictions."""

from collections import Counter
from collections.abc import Sequence

import numpy as np


def f1(predicted: np.ndarray, right: np.ndarray) -> float:
    """Returns the F1 score of label 1; 0 if it is neither predicted nor correct anywhere.

    Args:
      predicted: Int [n], predicted labels, 0 or 1.
      right: Int [n], correct labels.

    Example:
      >>> f1(np.array([1, 1, 0]), np.array([1, 0, 0]))
      0.6666666666666666
    """
    hits = int(((predicted == 1) & (right == 1)).sum())
    total = int((predicted == 1).sum() + (right == 1).sum())
    return 2 * hits / total if total else 0.0


def matthews_correlation(predicted: np.ndarray, right: np.ndarray) -> float:
    """Returns Matthews' correlation of two binary labelings; 0 if one of them is constant.

    Args:
      predicted: Int [n], predicted labels, 0 or 1.
      right: Int [n], correct labels.
    """
    return pearson(predicted.astype(np.float64), right.astype(np.float64))


def pearson(predicted: np.ndarray, right: np.ndarray) -> float:
    """Returns the linear correlation of two series, float [n]; 0 if one of them is constant."""
    a, b = predicted - predicted.mean(), right - right.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm else 0.0


def spearman(predicted: np.ndarray, right: np.ndarray) -> float:
    """Returns the rank correlation of two series, float [n]; ties have their mean rank."""
    return pearson(_ranks(predicted), _ranks(right))


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Returns the character n-gram F-score of translations, from 0 to 1.

    The score is F with beta 2, which weighs recall twice as much as precision. It covers character
    n-grams of order 1 to 6 without white space, counted over all sentences. Precision and recall
    are averaged over the orders that have n-grams in both.

    Source: Popović, 2015, "chrF: character n-gram F-score for automatic MT evaluation".

    Args:
      predictions: Translations.
      references: Reference of each translation.

    Example:
      >>> round(chrf(["the cat sat"], ["the cat sat"]), 6)
      1.0
    """
    hits, said, wanted = np.zeros((3, 6))
    for prediction, reference in zip(predictions, references, strict=True):
        for order in range(6):
            ours, theirs = _ngrams(prediction, order + 1), _ngrams(reference, order + 1)
            hits[order] += (ours & theirs).total()
            said[order] += ours.total()
            wanted[order] += theirs.total()
    used = (said > 0) & (wanted > 0)
    if not used.any():
        return 0.0
    precision = float((hits[used] / said[used]).mean())
    recall = float((hits[used] / wanted[used]).mean())
    both = 4 * precision + recall
    return 5 * precision * recall / both if both else 0.0


def _ngrams(text: str, order: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[start : start + order] for start in range(len(letters) - order + 1))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns float [n], the rank of each value from 1; ties have their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
