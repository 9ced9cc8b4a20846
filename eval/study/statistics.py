"""Tests whether a difference between two arms is significant."""

import dataclasses
from collections.abc import Sequence

import numpy as np

_ROUNDS = 20_000
MIN_P = 1 / (_ROUNDS + 1)
"""Minimum p-value of the permutation test, when no random flip reaches the difference."""


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation (n - 1).

    Example:
      >>> mean_and_deviation([1.0, 2.0, 3.0])
      (2.0, 1.0)
    """
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")


def sign_flip_p(differences: np.ndarray, *, rounds: int = _ROUNDS, seed: int = 0) -> float:
    """Returns the two-sided p-value of Fisher's paired permutation test, by random sign flips.

    Under the hypothesis that two arms are equal, each row's difference is equally likely to have
    either sign.

    Args:
      differences: [n], differences of two arms' losses by row.
      rounds: Number of random flips; the minimum p-value is 1 / (rounds + 1).
      seed: Seed of the flips.

    Example:
      >>> sign_flip_p(np.ones(20)) < 0.001, sign_flip_p(np.array([1.0, -1.0])) == 1.0
      (True, True)
    """
    differences = np.asarray(differences, np.float64)
    observed = abs(differences.sum())
    generator = np.random.default_rng(seed)
    reached = 0
    for start in range(0, rounds, 1000):
        flips = generator.choice((-1.0, 1.0), (min(1000, rounds - start), len(differences)))
        reached += int((np.abs(flips @ differences) >= observed * (1 - 1e-12)).sum())
    return (reached + 1) / (rounds + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for multiple comparisons (Holm, 1979), keeping their order.

    Example:
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of two arms on one task, over the same rows and seeds.

    Attributes:
      difference: Mean loss of the first arm minus the second's; below 0, the first is better.
      p: Uncorrected p-value of the paired test over rows, with losses averaged over seeds.
      seeds_ahead: Number of seeds in which the first arm's loss is lower.
      seeds: Number of seeds.
    """

    difference: float
    p: float
    seeds_ahead: int
    seeds: int


def compare(one: Sequence[dict], other: Sequence[dict]) -> Comparison:
    """Compares the measured cells of two arms, paired by seed and by row.

    Raises:
      ValueError: The cells differ in seeds or rows.
    """
    if [c["seed"] for c in one] != [c["seed"] for c in other] or not one:
        raise ValueError(
            f"cells have the seeds {[c['seed'] for c in one]} and {[c['seed'] for c in other]} but"
            " must have the same seeds"
        )
    if any(c["row_targets"] != one[0]["row_targets"] for c in (*one, *other)):
        raise ValueError("cells must be measured on the same rows, but their row_targets differ")
    losses = [np.mean([c["row_losses"] for c in cells], axis=0) for cells in (one, other)]
    differences = losses[0] - losses[1]
    pairs = list(zip(one, other, strict=True))
    return Comparison(
        difference=float(differences.sum() / np.sum(one[0]["row_targets"])),
        p=sign_flip_p(differences),
        seeds_ahead=sum(a["loss"] < b["loss"] for a, b in pairs),
        seeds=len(pairs),
    )
