"""Collects step metrics without blocking dispatch."""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

AHEAD = 8
"""Maximum number of steps that the host may be ahead of the devices.

It is large enough that devices never wait for the host, and small enough that waiting batches take
little memory.
"""


class StepMetrics(NamedTuple):
    """Metrics of one step.

    Attributes:
      step: Number of the step.
      values: Pytree of metric arrays.
      tokens: Number of tokens that the step reads.
    """

    step: int
    values: Any
    tokens: int


class PendingMetrics:
    """Queue of step metrics that returns a step's metrics once they are computed.

    Args:
      ahead: Maximum number of unfinished steps; beyond it, `ready` waits for the oldest.
    """

    def __init__(self, ahead: int = AHEAD):
        self._ahead = ahead
        self._waiting: collections.deque[StepMetrics] = collections.deque()

    def put(self, step: int, values: Any, tokens: int) -> None:
        """Adds the metrics of a dispatched step."""
        self._waiting.append(StepMetrics(step, values, tokens))

    def ready(self) -> Iterator[StepMetrics]:
        """Yields the finished steps in order; waits only for those too far behind."""
        while self._waiting:
            done = all(leaf.is_ready() for leaf in jax.tree.leaves(self._waiting[0].values))
            if not done and len(self._waiting) <= self._ahead:
                return
            yield self._wait()

    def drain(self) -> Iterator[StepMetrics]:
        """Yields all steps in order; waits for each."""
        while self._waiting:
            yield self._wait()

    def _wait(self) -> StepMetrics:
        measured = self._waiting.popleft()
        jax.block_until_ready(measured.values)
        return measured
