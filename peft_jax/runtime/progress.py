"""Prints messages and progress on the terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 15.0
"""Interval between progress lines if there is no terminal to draw a bar on."""


class Reporter:
    """Prints messages and progress: bars on a terminal, lines elsewhere.

    On a terminal a message wraps between words. Elsewhere it stays one line, so that logs can be
    searched.

    Args:
      quiet: Print nothing; for all processes of a run but the first.
      console: Console to print to. Default: standard error, so that results can be piped.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self._console = console or Console(stderr=True, quiet=quiet)

    def say(self, message: str) -> None:
        """Prints a message."""
        self._print(message)

    def warn(self, message: str) -> None:
        """Prints a highlighted warning."""
        self._print(f"warning: {message}", style="yellow")

    def steps(self, total: int, *, done: int = 0) -> "StepProgress":
        """Returns a progress display of `total` steps, of which `done` are finished."""
        return StepProgress(self._console, total=total, done=done)

    def counting(self, what: str, total: int) -> contextlib.AbstractContextManager["Counter"]:
        """Shows a counter during the block.

        Args:
          what: Name of the counted items.
          total: Number of items.
        """
        return _counting(self._console, what, total)

    def _print(self, message: str, **style: Any) -> None:
        self._console.print(
            message,
            markup=False,
            highlight=False,
            soft_wrap=not self._console.is_terminal,
            **style,
        )


class RewritingReporter(Reporter):
    """Passes messages through a function, and then to another reporter.

    Args:
      inner: Reporter that prints.
      rewrite: Returns the text to print in place of a message.
    """

    def __init__(self, inner: Reporter, rewrite: Callable[[str], str]):
        self._inner = inner
        self._rewrite = rewrite

    def say(self, message: str) -> None:
        """Prints a message."""
        self._inner.say(self._rewrite(message))

    def warn(self, message: str) -> None:
        """Prints a highlighted warning."""
        self._inner.warn(self._rewrite(message))

    def steps(self, total: int, *, done: int = 0) -> "StepProgress":
        """Returns a progress display of `total` steps, of which `done` are finished."""
        return self._inner.steps(total, done=done)

    def counting(self, what: str, total: int) -> contextlib.AbstractContextManager["Counter"]:
        """Shows a counter during the block; see `Reporter.counting`."""
        return self._inner.counting(what, total)


class Counter:
    """Counter of finished items; see `Reporter.counting`."""

    def __init__(self, console: Console, bar: Progress, what: str, total: int):
        self._console = console
        self._bar = bar
        self._what = what
        self._total = total
        self._done = 0
        self._task = bar.add_task(what, total=total)
        self._last_line = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Advances the counter by `count`."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"{self._what} {self._done}/{self._total}", highlight=False)


@contextlib.contextmanager
def _counting(console: Console, what: str, total: int) -> Iterator[Counter]:
    with _bar(console, TextColumn(what)) as bar:
        yield Counter(console, bar, what, total)


class StepProgress:
    """Shows steps, loss, tokens per second and time left; a context manager.

    The estimate of the time left excludes the first step shown, which includes compilation.

    Args:
      console: Console to draw on.
      total: Number of steps.
      done: Number of steps finished before.
    """

    def __init__(self, console: Console, *, total: int, done: int):
        self._console = console
        self._total = total
        self._done = done
        self._timed_from: tuple[int, float] | None = None
        self._last_line = time.monotonic()
        self._numbers = ""
        self._bar = _bar(console, TextColumn("step"), TextColumn("{task.fields[numbers]}"))
        self._task: Any = None

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        self._task = self._bar.add_task(
            "steps", total=self._total, completed=self._done, numbers=self._numbers
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Shows that `step` has been dispatched, without waiting for its values."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Shows the metrics of the newest finished step."""
        self._numbers = f"loss {loss:.4f}  {_short(tokens_per_second)} tokens/s"
        self._bar.update(self._task, numbers=self._numbers)
        now = time.monotonic()
        self._timed_from = self._timed_from or (step, now)
        if not self._console.is_terminal and (
            now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total
        ):
            self._last_line = now
            self._console.print(
                f"step {step}/{self._total}  {self._numbers}{self._left(step, now)}",
                highlight=False,
            )

    def _left(self, step: int, now: float) -> str:
        """Returns the time left as text; empty until two steps have been seen."""
        first, since = self._timed_from or (step, now)
        if step == first:
            return ""
        return f"  {_duration((now - since) / (step - first) * (self._total - step))} left"


def _bar(console: Console, name: TextColumn, *more: TextColumn) -> Progress:
    """Returns a progress bar that is drawn only on a terminal."""
    return Progress(
        name,
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        *more,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _short(number: float) -> str:
    """Returns a number with three digits and a unit: 12.3k.

    Example:
      >>> [_short(n) for n in (7.5, 123.0, 12345.0, 2.5e6)]
      ['7.50', '123', '12.3k', '2.50M']
    """
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{_digits(number / limit)}{unit}"
    return _digits(number)


def _digits(number: float) -> str:
    return (
        f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )


def _duration(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds.

    Example:
      >>> [_duration(s) for s in (5.4, 65.0, 3725.0)]
      ['0:05', '1:05', '1:02:05']
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
