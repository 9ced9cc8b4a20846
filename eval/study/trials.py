"""Chooses the trials of an arm: a grid of learning rates and attention scales, then extensions."""

import dataclasses
import math
from collections.abc import Callable, Mapping

Point = tuple[int, int]
"""Indices of a rate and a scale; those outside the grid continue it geometrically."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that are chosen for each arm on each task.

    Attributes:
      rate: Peak learning rate.
      scale: Factor on the learning rate of the attention's arrays.
    """

    rate: float
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Name in the names of cells.

        Example:
          >>> Trial(0.0125, 4.0).name
          '0.0125-x4'
        """
        return f"{self.rate:g}-x{self.scale:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Best trial of an arm on a task.

    Attributes:
      trial: Trial with the lowest loss on the tuning rows.
      loss: That loss.
      trials: Number of finished trials.
      extensions: Number of those outside the grid.
      diverged: Number of those that diverged.
      edges: Directions in which the best trial has no neighbor, "lower rate" or "higher scale",
        because the extensions are used up.
    """

    trial: Trial
    loss: float
    trials: int
    extensions: int
    diverged: int
    edges: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """State of the search for the best trial.

    Attributes:
      missing: Trials to run next; empty once the search is finished.
      choice: Best trial; None until then, or if all trials diverged.
    """

    missing: tuple[Trial, ...]
    choice: Choice | None


@dataclasses.dataclass(frozen=True)
class Grid:
    """Trials of an arm on a task.

    Attributes:
      rates: Increasing learning rates.
      scales: Increasing scales of the attention's learning rate.
      extensions: Largest number of trials outside the grid.

    Example:
      >>> Grid((1e-3, 4e-3), (0.25, 1.0), 4).trial((2, -1))
      Trial(rate=0.016, scale=0.0625)
    """

    rates: tuple[float, ...]
    scales: tuple[float, ...]
    extensions: int

    def points(self) -> list[Point]:
        """Returns the points of the grid."""
        return [(i, j) for i in range(len(self.rates)) for j in range(len(self.scales))]

    def trial(self, point: Point) -> Trial:
        """Returns the trial at a point inside or outside the grid."""
        return Trial(_value(self.rates, point[0]), _value(self.scales, point[1]))

    def search(self, loss_of: Callable[[Trial], float | None]) -> Search:
        """Replays the search on the finished trials.

        The whole grid comes first. Then, while the best trial so far lacks a neighbor along an axis
        with several values, that neighbor is the next trial, until the extensions are used up. All
        decisions follow from the losses, so the search can resume in another process.

        Args:
          loss_of: Returns the loss of a finished trial, infinite if it diverged; None for a trial
            that is not finished.
        """
        losses: dict[Point, float] = {}
        missing = []
        for point in self.points():
            loss = loss_of(self.trial(point))
            if loss is None:
                missing.append(self.trial(point))
            else:
                losses[point] = loss
        if missing:
            return Search(missing=tuple(missing), choice=None)
        for _ in range(self.extensions):
            absent = self._absent(losses)
            if not absent:
                break
            following = next(iter(absent.values()))
            loss = loss_of(self.trial(following))
            if loss is None:
                return Search(missing=(self.trial(following),), choice=None)
            losses[following] = loss
        best = _best(losses)
        if best is None:
            return Search(missing=(), choice=None)
        return Search(
            missing=(),
            choice=Choice(
                trial=self.trial(best),
                loss=losses[best],
                trials=len(losses),
                extensions=len(losses) - len(self.points()),
                diverged=sum(math.isinf(loss) for loss in losses.values()),
                edges=tuple(self._absent(losses)),
            ),
        )

    def _absent(self, losses: Mapping[Point, float]) -> dict[str, Point]:
        """Returns the neighbors that the best trial lacks, by direction."""
        best = _best(losses)
        if best is None:
            return {}
        rate, scale = best
        neighbors: dict[str, Point] = {}
        if len(self.rates) > 1:
            neighbors |= {"lower rate": (rate - 1, scale), "higher rate": (rate + 1, scale)}
        if len(self.scales) > 1:
            neighbors |= {"lower scale": (rate, scale - 1), "higher scale": (rate, scale + 1)}
        return {name: point for name, point in neighbors.items() if point not in losses}


def _best(losses: Mapping[Point, float]) -> Point | None:
    """Returns the point of the lowest loss; None if all are infinite."""
    best = min(losses, key=losses.__getitem__)
    return None if math.isinf(losses[best]) else best


def _value(values: tuple[float, ...], index: int) -> float:
    """Returns a value of an axis, which continues geometrically beyond its ends."""
    if index < 0:
        value = values[0] * (values[0] / values[1]) ** -index
    elif index >= len(values):
        value = values[-1] * (values[-1] / values[-2]) ** (index - len(values) + 1)
    else:
        return values[index]
    return float(f"{value:.6g}")
