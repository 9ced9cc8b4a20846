"""Log records in the form of the commands' own lines, without logging's prefixes."""

import logging
import os
import shutil
import sys
import textwrap

from peft_jax.runtime.printable import printable


def show_log_lines() -> None:
    """Prints warnings and errors of all loggers as lines such as "warning: …".

    Where a program has handlers of its own, as a notebook or a test has, nothing changes.
    """
    # transformers would warn that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_Lines())


class _Lines(logging.Handler):
    """Writes to whatever the standard error is at the time: a progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = _as_line(record)
            if sys.stderr.isatty():
                line = _wrap(line, shutil.get_terminal_size().columns)
            print(line, file=sys.stderr, flush=True)
        except Exception:  # as logging's own handlers do
            self.handleError(record)


def _wrap(text: str, width: int) -> str:
    """Wraps the lines of a text between words.

    Example:
      >>> print(_wrap("warning: a long line of words", 16))
      warning: a long
      line of words
    """
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def _as_line(record: logging.LogRecord) -> str:
    """Returns a record as a line; where it holds an exception, its traceback follows."""
    level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    line = f"{level}{printable(record.getMessage())}"
    if record.exc_info:
        line = f"{line}\n{logging.Formatter().formatException(record.exc_info)}"
    return line
