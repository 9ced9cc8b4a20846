"""What an evaluation says on the terminal while it goes on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
    """Messages and bars, on the standard error, so that results can be piped.

    Args:
      console: where to write.
    """

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True, soft_wrap=True)

    def say(self, message: str) -> None:
        """Prints one message."""
        self._console.print(message, markup=False, highlight=False)

    def warn(self, message: str) -> None:
        """Prints one message that should not be missed."""
        self._console.print(f"warning: {message}", markup=False, highlight=False, style="yellow")

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator["Counter"]:
        """A bar on a terminal and lines elsewhere, for the length of the block.

        Args:
          what: what is counted, in a word or two.
          total: how many there are.
        """
        bar = Progress(
            TextColumn(what),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        with bar:
            yield Counter(self._console, bar, what, total)


class Counter:
    """Counts what is done; see `Reporter.counting`."""

    def __init__(self, console: Console, bar: Progress, what: str, total: int):
        self._console = console
        self._bar = bar
        self._what = what
        self._total = total
        self._done = 0
        self._task = bar.add_task(what, total=total)
        self._last_line = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"{self._what} {self._done}/{self._total}", highlight=False)
