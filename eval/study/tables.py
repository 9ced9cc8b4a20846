"""Formats numbers and tables of a study's pages."""

from collections.abc import Collection, Sequence
from typing import Any

from .statistics import Comparison, mean_and_deviation


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)
) -> str:
    """Returns a Markdown table, whose columns are right-aligned but for those in `left`.

    Example:
      >>> print(table(["arm", "loss"], [["LoRA", "1.0"]]))
      | arm | loss |
      | --- | ---: |
      | LoRA | 1.0 |
    """
    rule = ["---" if at in left else "---:" for at in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def interval(found: Comparison) -> str:
    """Formats a difference with its interval.

    Example:
      >>> interval(Comparison(difference=-0.01, low=-0.02, high=0.001, deviation=0.0, p=1.0,
      ...     seeds_ahead=1, seeds=2, rows=3))
      '-0.0100 [-0.0200, +0.0010]'
    """
    return f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def p_value(p: float) -> str:
    """Formats a p-value.

    Example:
      >>> p_value(0.0423), p_value(1e-7), p_value(1.0)
      ('0.042', '< 0.0001', '1')
    """
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def share(value: float) -> str:
    """Formats a share.

    Example:
      >>> share(0.256)
      '26%'
    """
    return f"{value:.0%}"


def plus_minus(cells: Sequence[dict[str, Any]], values: Sequence[float | None], digits: int) -> str:
    """Formats mean ± deviation over cells, or why values are missing.

    Example:
      >>> fine, gone = {"diverged": False}, {"diverged": True}
      >>> plus_minus([fine, fine], [1.0, 3.0], 1)
      '2.0 ± 1.4'
      >>> plus_minus([fine, gone], [1.0, None], 1), plus_minus([gone], [None], 1)
      ('1 diverged', 'diverged')
      >>> plus_minus([fine, fine], [None, None], 1), plus_minus([fine, fine], [1.0, None], 1)
      ('not measured', '1 not measured')
    """
    numbers = [value for value in values if value is not None]
    if len(numbers) == len(values):
        mean, deviation = mean_and_deviation(numbers)
        return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
    counts = {"diverged": 0, "not measured": 0}
    for cell, value in zip(cells, values, strict=True):
        if value is None:
            counts["diverged" if cell["diverged"] else "not measured"] += 1
    return ", ".join(
        reason if count == len(values) else f"{count} {reason}"
        for reason, count in counts.items()
        if count
    )
