"""Rows that cannot be used: what is wrong with each, and how many there are."""

import collections
import threading


class BadRowError(ValueError):
    """A row cannot be used.

    Attributes:
      reason: the kind of fault, under which rows are counted ("broken JSON", "missing field").
      detail: what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
        self._seen: set[int] = set()
        self._counts: collections.Counter[str] = collections.Counter()
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
            if row in self._seen:
                return False
            self._seen.add(row)
            self._counts[error.reason] += 1
            if len(self._first) >= self.shown:
                return False
            self._first.append(f"{where}: {error}")
            return True

    def __len__(self) -> int:
        """How many rows cannot be used, of those that were met."""
        return len(self._seen)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows by reason, the most frequent first."""
        with self._lock:
            return dict(self._counts.most_common())

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
        counts = ", ".join(f"{number} {reason}" for reason, number in self.counts.items())
        lines = [f"  {line}" for line in self._first]
        more = len(self) - len(self._first)
        if more:
            lines.append(f"  and {more} more")
        head = f"{self.what}: {len(self)} of {total} cannot be used ({counts}):"
        return "\n".join([head, *lines])
