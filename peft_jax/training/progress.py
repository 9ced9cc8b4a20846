"""What a run says on the terminal while it goes on."""

import time
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
"""How often a line is printed where there is no terminal to draw a bar on."""


class Reporter:
    """Messages, and the progress of steps: a bar on a terminal, and lines elsewhere.

    Args:
      quiet: say nothing; for all processes of a run but the first.
      console: where to write; the standard error by default, so that results can be piped.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self._console = console or Console(stderr=True, quiet=quiet, soft_wrap=True)

    def say(self, message: str) -> None:
        """Prints one message."""
        self._console.print(message, markup=False, highlight=False)

    def warn(self, message: str) -> None:
        """Prints one message that should not be missed."""
        self._console.print(f"warning: {message}", markup=False, highlight=False, style="yellow")

    def steps(self, total: int, *, done: int = 0) -> "StepProgress":
        """The progress of `total` steps, of which `done` are done."""
        return StepProgress(self._console, total=total, done=done)


class StepProgress:
    """A bar with the loss, tokens a second and the time left; a context.

    Args:
      console: where it is drawn.
      total: how many steps there are.
      done: how many of them are behind us.
    """

    def __init__(self, console: Console, *, total: int, done: int):
        self._console = console
        self._total = total
        self._started_at = done
        self._started = time.monotonic()
        self._last_line = self._started
        self._numbers = ""
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        self._task = self._bar.add_task(
            "steps", total=self._total, completed=self._started_at, numbers=self._numbers
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """The step that has been started; no value of it is needed yet."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """The numbers of the newest step for which they are known."""
        self._numbers = f"loss {loss:.4f}  {_short(tokens_per_second)} tokens/s"
        self._bar.update(self._task, numbers=self._numbers)
        now = time.monotonic()
        if not self._console.is_terminal and (
            now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total
        ):
            self._last_line = now
            left = (now - self._started) / max(step - self._started_at, 1) * (self._total - step)
            self._console.print(
                f"step {step}/{self._total}  {self._numbers}  {_duration(left)} left",
                highlight=False,
            )


def _short(number: float) -> str:
    """A number with three digits and its thousands: 12.3k.

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
    """Seconds as hours, minutes and seconds.

    Example:
      >>> [_duration(s) for s in (5.4, 65.0, 3725.0)]
      ['0:05', '1:05', '1:02:05']
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
