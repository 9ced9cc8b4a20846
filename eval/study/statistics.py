"""Whether a difference between two arms is more than chance."""

import dataclasses
from collections.abc import Sequence

import numpy as np

_ROUNDS = 20_000
LEAST_P = 1 / (_ROUNDS + 1)
"""The floor of the permutation test: no random flip reached the difference."""


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1).

    Example:
      >>> mean_and_deviation([1.0, 2.0, 3.0])
      (2.0, 1.0)
    """
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")


def sign_flip_p(differences: np.ndarray, *, rounds: int = _ROUNDS, seed: int = 0) -> float:
    """The two-sided p-value of a paired permutation test (Fisher's, by random sign flips).

    Under the hypothesis that two arms are alike, each row's difference is as likely to have the
    other sign.

    Args:
      differences: [n], one arm's loss less the other's, row by row.
      rounds: random flips; the least p-value is 1 / (rounds + 1).
      seed: of the flips.

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
    """p-values corrected for being several (Holm, 1979), in their order.

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
    """One arm against another on one task, over the same rows and seeds.

    Attributes:
      difference: mean loss of the one less that of the other; below 0 the one is better.
      p: of the paired test over rows, their losses averaged over seeds; not corrected.
      seeds_ahead: in how many seeds the one's loss is lower.
      seeds: of how many.
    """

    difference: float
    p: float
    seeds_ahead: int
    seeds: int


def compare(one: Sequence[dict], other: Sequence[dict]) -> Comparison:
    """Compares the measured cells of two arms, paired by seed and by row.

    Raises:
      ValueError: the cells are not of the same seeds and rows.
    """
    if [c["seed"] for c in one] != [c["seed"] for c in other] or not one:
        raise ValueError("the cells to be compared are not of the same seeds")
    if any(c["row_targets"] != one[0]["row_targets"] for c in (*one, *other)):
        raise ValueError("the cells to be compared were not measured on the same rows")
    losses = [np.mean([c["row_losses"] for c in cells], axis=0) for cells in (one, other)]
    differences = losses[0] - losses[1]
    pairs = list(zip(one, other, strict=True))
    return Comparison(
        difference=float(differences.sum() / np.sum(one[0]["row_targets"])),
        p=sign_flip_p(differences),
        seeds_ahead=sum(a["loss"] < b["loss"] for a, b in pairs),
        seeds=len(pairs),
    )
