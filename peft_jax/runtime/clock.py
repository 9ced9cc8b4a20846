"""Measures a run's time by phase and its throughput."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping


class Phases:
    """Measures seconds by phase; an inner phase's time does not count for the outer one.

    Args:
      now: Clock, in seconds.

    Example:
      >>> times = iter([0.0, 1.0, 3.0, 7.0])
      >>> phases = Phases(now=lambda: next(times))
      >>> with phases("train"):
      ...     with phases("evaluate"):
      ...         pass
      >>> phases.seconds
      {'train': 5.0, 'evaluate': 2.0}
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter):
        self._spent: dict[str, float] = {}
        self._now = now
        self._running: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to the phase `name`."""
        started = self._now()
        if self._running:
            self._stop(started)
        self._spent.setdefault(name, 0.0)
        self._running.append((name, started))
        try:
            yield
        finally:
            ended = self._now()
            self._stop(ended)
            self._running.pop()
            if self._running:
                self._running[-1] = (self._running[-1][0], ended)

    def add(self, before: Mapping[str, float]) -> None:
        """Adds the seconds by phase of an earlier part of the same run."""
        for name, seconds in before.items():
            self._spent[name] = self._spent.get(name, 0.0) + seconds

    def _stop(self, when: float) -> None:
        name, since = self._running[-1]
        self._spent[name] += when - since

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far, including the running phase."""
        spent = dict(self._spent)
        if self._running:
            name, since = self._running[-1]
            spent[name] += self._now() - since
        return spent

    def spent(self, name: str) -> float:
        """Returns the seconds of one phase so far."""
        return self.seconds.get(name, 0.0)


class Rate:
    """Measures a rate per second over a sliding window.

    Args:
      window: Length of the window, in seconds.
      now: Clock, in seconds; it may stand still during other work.

    Example:
      >>> times = iter([0.0, 1.0, 2.0, 2.0])
      >>> rate = Rate(now=lambda: next(times))
      >>> rate.add(100)
      >>> rate.add(300)
      >>> rate.per_second
      200.0
    """

    def __init__(self, *, window: float = 30.0, now: Callable[[], float] = time.perf_counter):
        self._window = window
        self._now = now
        self._counts: collections.deque[tuple[float, float]] = collections.deque()
        self._since = now()
        self._sum = 0.0

    def add(self, count: int) -> None:
        """Adds `count` units that have just been done."""
        when = self._now()
        self._counts.append((when, count))
        self._sum += count
        while when - self._counts[0][0] > self._window:
            self._since, gone = self._counts.popleft()
            self._sum -= gone

    @property
    def per_second(self) -> float:
        """Mean rate over the window; 0 if no time has passed."""
        elapsed = self._now() - self._since
        return self._sum / elapsed if elapsed > 0 else 0.0
