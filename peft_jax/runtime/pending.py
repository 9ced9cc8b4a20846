"""What the devices are still computing, looked at once it is there."""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

AHEAD = 8
"""How many steps the host may be ahead of the devices: enough that they never wait for it, and few
enough that the batches waiting for them take little memory."""


class StepMetrics(NamedTuple):
    """One step's measurements.

    Attributes:
      step: which step.
      values: the arrays.
      tokens: how many tokens it read.
    """

    step: int
    values: Any
    tokens: int


class PendingMetrics:
    """Measurements of steps, taken out when they are computed and not waited for before.

    Args:
      ahead: how many steps may be under way; before one more, the oldest is waited for.
    """

    def __init__(self, ahead: int = AHEAD):
        self._ahead = ahead
        self._waiting: collections.deque[StepMetrics] = collections.deque()

    def put(self, step: int, values: Any, tokens: int) -> None:
        """Takes the arrays that a step will have computed, and how many tokens it reads."""
        self._waiting.append(StepMetrics(step, values, tokens))

    def ready(self) -> Iterator[StepMetrics]:
        """The steps that are done, in order; waits only for those too far behind."""
        while self._waiting:
            done = all(leaf.is_ready() for leaf in jax.tree.leaves(self._waiting[0].values))
            if not done and len(self._waiting) <= self._ahead:
                return
            yield self._wait()

    def drain(self) -> Iterator[StepMetrics]:
        """All steps, in order; waits for each."""
        while self._waiting:
            yield self._wait()

    def _wait(self) -> StepMetrics:
        measured = self._waiting.popleft()
        jax.block_until_ready(measured.values)
        return measured
