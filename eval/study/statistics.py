"""Compares two arms: the mean difference, its interval, and a test over seeds."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr

ROUNDS = 10_000
LEVEL = 0.95


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation (n - 1).

    Example:
      >>> mean_and_deviation([1.0, 2.0, 3.0])
      (2.0, 1.0)
    """
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")


def paired_t_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of the paired t-test.

    Args:
      differences: One difference per seed.

    Example:
      >>> round(paired_t_p([0.1, 0.2, 0.3]), 4)
      0.0742
    """
    mean, deviation = mean_and_deviation(differences)
    if deviation == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    n = len(differences)
    return float(2.0 * stdtr(n - 1, -abs(mean) / (deviation / math.sqrt(n))))


def crossed_interval(
    differences: np.ndarray, targets: np.ndarray, *, rounds: int = ROUNDS, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95% interval of a mean difference by a bootstrap over seeds and rows.

    Each round draws seeds and rows with replacement, independently of each other, and takes the
    mean difference over the drawn seeds and the targets of the drawn rows. The interval holds for
    other seeds and for other rows (Owen, 2007, "The pigeonhole bootstrap"). It is the percentile
    interval.

    Args:
      differences: [seeds, rows], differences of two arms' summed losses.
      targets: [rows], numbers of targets.
      rounds: Number of rounds.
      seed: Seed of the draws.

    Example:
      >>> crossed_interval(np.ones((3, 5)), np.full(5, 2.0))
      (0.5, 0.5)
    """
    seeds, rows = differences.shape
    generator = np.random.default_rng(seed)
    means = np.empty(rounds)
    for start in range(0, rounds, 1000):
        stop = min(start + 1000, rounds)
        chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), stop - start)
        weights = generator.multinomial(rows, np.full(rows, 1 / rows), stop - start)
        sums = ((chosen / seeds) @ differences * weights).sum(axis=1)
        means[start:stop] = sums / (weights @ targets)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


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
      low, high: 95% interval of the difference over seeds and rows.
      deviation: Standard deviation of the difference over seeds.
      p: Uncorrected p-value of the paired t-test over seeds.
      seeds_ahead: Number of seeds in which the first arm's loss is lower.
      seeds: Number of seeds.
      rows: Number of test rows.
    """

    difference: float
    low: float
    high: float
    deviation: float
    p: float
    seeds_ahead: int
    seeds: int
    rows: int


def compare(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> Comparison:
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
    targets = np.asarray(one[0]["row_targets"], np.float64)
    losses = [np.asarray([c["row_losses"] for c in cells], np.float64) for cells in (one, other)]
    differences = losses[0] - losses[1]
    by_seed = differences.sum(axis=1) / targets.sum()
    low, high = crossed_interval(differences, targets)
    mean, deviation = mean_and_deviation(by_seed.tolist())
    return Comparison(
        difference=mean,
        low=low,
        high=high,
        deviation=deviation,
        p=paired_t_p(by_seed.tolist()),
        seeds_ahead=int((by_seed < 0).sum()),
        seeds=len(by_seed),
        rows=len(targets),
    )
