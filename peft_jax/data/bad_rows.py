"""Records rows that cannot be used, with counts by reason."""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_MOST_SHOWN = 300
"""Largest number of characters of a message; a row's text may have any length."""

_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (RecursionError, "nested too deeply"),
    (UnicodeError, "not Unicode"),
    (MemoryError, "too large"),
)
"""Reasons of exceptions; for others, the reason is the name of their type."""


class BadRowError(ValueError):
    """Raised for a row that cannot be used.

    Attributes:
      reason: Kind of fault, by which rows are counted ("broken JSON", "missing field").
      detail: Description of this row's fault.
      tokens: Number of tokens of a row that is too long; None for other faults.
    """

    def __init__(self, reason: str, detail: str, *, tokens: int | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.tokens = tokens


@contextlib.contextmanager
def as_bad_row() -> Iterator[None]:
    """Turns any exception caused by one row into a `BadRowError`.

    A row may hold any text, and a chat template is a program, so that parsers, templates and
    tokenizers may raise any exception. Only errors that are not the row's fault, such as a failing
    disk (`OSError`), pass unchanged.

    Example:
      >>> with as_bad_row():
      ...     {}["text"]
      Traceback (most recent call last):
      peft_jax.data.bad_rows.BadRowError: KeyError: 'text'
    """
    try:
        yield
    except (BadRowError, OSError):
        raise
    except Exception as error:
        kind = type(error).__name__
        reason = next((reason for of, reason in _REASONS if isinstance(error, of)), kind)
        detail = str(error) or kind
        raise BadRowError(reason, detail) from error


def check_unicode(value: Any) -> None:
    """Rejects strings with lone surrogates, which UTF-8 cannot encode.

    Args:
      value: A string, or a mapping or sequence whose strings are all checked.

    Raises:
      BadRowError: A string has a lone surrogate.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise BadRowError(
                "not Unicode", f"character {error.start + 1} is the lone surrogate U+{code:04X}"
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_unicode(key)
            check_unicode(item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_unicode(item)


def one_line(text: str) -> str:
    r"""Returns any text as one short printable line.

    Example:
      >>> one_line("a\nb\x1b[2J")
      'a\\nb\\x1b[2J'
    """
    shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


class UnusableRowsError(ValueError):
    """Raised if bad rows are an error by the settings, or if no row can be used."""


class BadRows:
    """Counts the rows that cannot be used, and keeps the first few for messages.

    A row is counted once, even if several epochs reach it. Thread-safe.

    Attributes:
      what: Name of the rows in messages, such as "training rows".
      shown: Number of rows kept for messages.
    """

    shown = 5

    def __init__(self, what: str):
        """Starts without bad rows."""
        self.what = what
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}
        self._tokens: dict[int, int] = {}
        self._first: list[str] = []

    def add(self, row: int, where: str, error: BadRowError) -> bool:
        """Counts one row.

        Args:
          row: Index of the row, which identifies it.
          where: File and line, or table and row, for messages.
          error: Fault of the row.

        Returns:
          Whether the row is new and among the first few.
        """
        with self._lock:
            if row in self._reasons:
                return False
            self._reasons[row] = error.reason
            if error.tokens is not None:
                self._tokens[row] = error.tokens
            if len(self._first) >= self.shown:
                return False
            self._first.append(f"{where}: {one_line(str(error))}")
            return True

    def __len__(self) -> int:
        """Returns the number of bad rows found so far."""
        return len(self._reasons)

    @property
    def counts(self) -> dict[str, int]:
        """Number of bad rows by reason, the most frequent first."""
        return self.counts_of(lambda row: True)

    def counts_of(self, chosen: Callable[[int], bool]) -> dict[str, int]:
        """Returns `counts` for the rows whose index satisfies `chosen`."""
        with self._lock:
            found = (reason for row, reason in self._reasons.items() if chosen(row))
            return dict(collections.Counter(found).most_common())

    def tokens_of(self, chosen: Callable[[int], bool]) -> list[int]:
        """Returns the number of tokens of each chosen row that is too long."""
        with self._lock:
            return [tokens for row, tokens in self._tokens.items() if chosen(row)]

    def describe(self, total: int) -> str:
        """Summarizes the bad rows among `total` rows in one line, followed by the first few.

        Example:
          >>> bad = BadRows("training rows")
          >>> bad.add(6, "train.jsonl:7", BadRowError("empty", "field 'answer' is empty"))
          True
          >>> print(bad.describe(100))
          training rows: 1 of 100 cannot be used (1 empty):
            train.jsonl:7: empty: field 'answer' is empty
        """
        counts = ", ".join(f"{number:,} {reason}" for reason, number in self.counts.items())
        lines = [f"  {line}" for line in self._first]
        more = len(self) - len(self._first)
        if more:
            lines.append(f"  and {more} more")
        head = f"{self.what}: {len(self):,} of {total:,} cannot be used ({counts}):"
        return "\n".join([head, *lines])
