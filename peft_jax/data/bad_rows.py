"""Rows that cannot be used: what is wrong with each, and how many there are."""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_MOST_SHOWN = 300
"""Number of characters of a message that are shown: a row's text may be any length."""

_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (RecursionError, "nested too deeply"),
    (UnicodeError, "not Unicode"),
    (MemoryError, "too large"),
)
"""Reasons under which exceptions are counted; others go by the names of their types."""


class BadRowError(ValueError):
    """A row cannot be used.

    Attributes:
      reason: the kind of fault, under which rows are counted ("broken JSON", "missing field").
      detail: what is wrong with this one.
      tokens: Number of tokens of a row that is too long; None for any other fault.
    """

    def __init__(self, reason: str, detail: str, *, tokens: int | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.tokens = tokens


@contextlib.contextmanager
def as_bad_row() -> Iterator[None]:
    """Turns whatever goes wrong with one row into a `BadRowError`.

    A row holds what anyone may have written, and a chat template is a program: together they can
    make a parser, a template or a tokenizer raise anything. Only what is not the row's fault, such
    as a disk that fails (`OSError`), passes.

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
    """Rejects text with lone surrogates, which stand for no character and have no UTF-8 form.

    Args:
      value: a text; or a mapping or sequence, all of whose texts are checked.

    Raises:
      BadRowError: there is one.
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
    r"""A text that may hold anything, as one short printable line.

    Example:
      >>> one_line("a\nb\x1b[2J")
      'a\\nb\\x1b[2J'
    """
    shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


class UnusableRowsError(ValueError):
    """Rows cannot be used, and the settings make that an error; or none of the rows can be."""


class BadRows:
    """Counts the rows that cannot be used, and keeps the first few to be shown.

    A row is counted once however many epochs meet it. Safe to use from several threads.

    Attributes:
      what: the rows' name in messages, such as "training rows".
      shown: how many rows are kept to be shown.
    """

    shown = 5

    def __init__(self, what: str):
        """Starts with none."""
        self.what = what
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}
        self._tokens: dict[int, int] = {}
        self._first: list[str] = []

    def add(self, row: int, where: str, error: BadRowError) -> bool:
        """Counts one row.

        Args:
          row: the row's index, by which it is known again.
          where: the file and line, or the table and row, for the message.
          error: what is wrong with it.

        Returns:
          Whether it is new, and one of the first few.
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
        """How many rows cannot be used, of those that were met."""
        return len(self._reasons)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows by reason, the most frequent first."""
        return self.counts_of(lambda row: True)

    def counts_of(self, chosen: Callable[[int], bool]) -> dict[str, int]:
        """As `counts`, of the rows that are chosen by their indices."""
        with self._lock:
            found = (reason for row, reason in self._reasons.items() if chosen(row))
            return dict(collections.Counter(found).most_common())

    def tokens_of(self, chosen: Callable[[int], bool]) -> list[int]:
        """Number of tokens of each chosen row that is too long."""
        with self._lock:
            return [tokens for row, tokens in self._tokens.items() if chosen(row)]

    def describe(self, total: int) -> str:
        """One line on how many of `total` rows there are and why, then the first few.

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
