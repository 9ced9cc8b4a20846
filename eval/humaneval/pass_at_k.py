"""Estimates pass@k from n samples of a problem, c of which pass."""

import math
from collections.abc import Sequence


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k, 1 − C(n−c, k) / C(n, k).

    The simpler 1 − (1 − c/n)^k is biased (Chen et al., 2021, arXiv 2107.03374, section 2.1).

    Args:
      samples: Number of samples n, at least k.
      passed: Number of samples c that pass.
      k: Number of attempts.

    Raises:
      ValueError: There are fewer samples than k, or more passes than samples.

    Example:
      >>> round(pass_at_k(10, 3, 1), 6)
      0.3
      >>> round(pass_at_k(4, 1, 2), 6)
      0.5
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(
            f"pass@{k} cannot be estimated from {samples} samples, {passed} of which passed"
        )
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean over problems and its standard error, which is None for one problem.

    Example:
      >>> mean_and_standard_error([0.0, 1.0])
      (0.5, 0.5)
    """
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)
