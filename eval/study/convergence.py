"""Computes how soon an arm reaches the loss at which another one ends."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from .cell import Cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reached:
    """Steps after which an arm's held-out loss is at most another arm's last one.

    Attributes:
      reached: Number of seeds in which it gets there.
      seeds: Number of seeds.
      steps: Median over these seeds, interpolated between measurements; None unless most get there.
    """

    reached: int
    seeds: int
    steps: float | None


def steps_to_match(cells: Sequence[Cell], other: Sequence[Cell]) -> Reached:
    """Returns how soon each run reaches the last held-out loss of the other arm's run.

    Args:
      cells: Measured cells of the arm.
      other: Measured cells of the other arm, with the same seeds in the same order.
    """
    found = [
        steps_to(one["curve"], two["curve"]["losses"][-1])
        for one, two in zip(cells, other, strict=True)
        if two["curve"]["losses"] and two["curve"]["losses"][-1] is not None
    ]
    there = [steps for steps in found if steps is not None]
    most = 2 * len(there) > len(cells)
    return Reached(
        reached=len(there),
        seeds=len(cells),
        steps=statistics.median(there) if most else None,
    )


def steps_to(curve: dict[str, Any], level: float) -> float | None:
    """Returns the first step at which a curve is at most `level`; None if it never is.

    Example:
      >>> steps_to({"steps": [10, 20, 30], "losses": [3.0, 2.0, 1.0]}, 1.5)
      25.0
      >>> steps_to({"steps": [10, 20], "losses": [3.0, 2.0]}, 1.5) is None
      True
    """
    before: tuple[float, float] | None = None
    for step, loss in zip(curve["steps"], curve["losses"], strict=True):
        if loss is None:
            return None
        if loss <= level:
            if before is None or before[1] == loss:
                return float(step)
            share = (before[1] - level) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (float(step), loss)
    return None
