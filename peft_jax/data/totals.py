"""How many rows there are, how many are used, and why the others are not."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft_jax.data.encode import TOO_LONG

_TOO_MANY_LOST = 0.1
"""The share of lost rows above which a warning says what to change."""

_SHOULD_FIT = 0.95
"""The share of rows that the `train.max_length` suggested in a warning would hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where rows come from, and what became of the others there.

    Attributes:
      name: files, or a data set on the hub.
      split: the split they are; empty for a file that is given by name.
      rows: Number of rows there.
      held_out: Number of them that are held out for evaluation.
      set_aside: Number of them that `data.train_rows` or `data.eval_rows` leaves out.
      chosen: whether a setting names the split.
    """

    name: str
    split: str = ""
    rows: int = 0
    held_out: int = 0
    set_aside: int = 0
    chosen: bool = True

    def __str__(self) -> str:
        """The place in words.

        Example:
          >>> str(Origin(name="data/train.jsonl", split="train", rows=10))
          'data/train.jsonl (split train)'
        """
        return f"{self.name} (split {self.split})" if self.split else self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTotals:
    """What is known of a run's rows.

    Attributes:
      what: the rows' name in messages: "training rows".
      origin: where they come from.
      rows: Number of rows that the run takes from there.
      checked: Number of them that have been encoded so far, each counted once.
      used: Number of those that can be learned or measured.
      left_out: Number of rows that cannot, by reason.
      truncated: Number of used rows that lost their ends.
      too_long: Number of tokens of each row that was left out or truncated.
    """

    what: str
    origin: Origin
    rows: int
    checked: int
    used: int
    left_out: Mapping[str, int]
    truncated: int
    too_long: Sequence[int] = ()

    def describe(self) -> str:
        """The totals in words.

        Example:
          >>> totals = RowTotals(
          ...     what="training rows", origin=Origin(name="a.jsonl", rows=100, held_out=5),
          ...     rows=95, checked=95, used=94, left_out={"too long": 1}, truncated=0)
          >>> print(totals.describe())
          training rows: 95 of the 100 in a.jsonl (5 held out); 94 used, 1 left out (1 too long)
        """
        apart = {"held out": self.origin.held_out, "set aside": self.origin.set_aside}
        notes = ", ".join(f"{number:,} {name}" for name, number in apart.items() if number)
        of = f" of the {self.origin.rows:,}" if self.rows < self.origin.rows else ""
        head = f"{self.rows:,}{of} in {self.origin}" + (f" ({notes})" if notes else "")
        if not self.rows or not self.checked:
            return f"{self.what}: {head}" + ("; none was checked" if self.rows else "")
        sample = f"of {self.checked:,} checked, " if self.checked < self.rows else ""
        return f"{self.what}: {head}; {sample}{self.describe_use()}"

    def describe_use(self) -> str:
        """How many of the checked rows are used, and why the others are not."""
        parts = [f"{self.used:,} used"]
        if lost := sum(self.left_out.values()):
            parts.append(f"{lost:,} left out ({_reasons(self.left_out)})")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        return ", ".join(parts)

    def warnings(self, *, max_length: int, extra: int) -> list[str]:
        """What a user should know before the run begins.

        Args:
          max_length: positions of a row.
          extra: Number of tokens of a sequence beyond the positions it takes.
        """
        return [
            *self._warn_of_split(),
            *self._warn_of_lost_rows(max_length=max_length, extra=extra),
        ]

    def _warn_of_split(self) -> list[str]:
        origin = self.origin
        if origin.chosen or not origin.split or origin.split == "train":
            return []
        return [
            f"there is no split named train: the {self.what} are those of {origin}; name a split in"
            " data.train_split to choose it"
        ]

    def _warn_of_lost_rows(self, *, max_length: int, extra: int) -> list[str]:
        left_out = sum(self.left_out.values())
        lost = left_out + self.truncated
        if not self.checked or lost <= _TOO_MANY_LOST * self.checked:
            return []
        share = f"{lost:,} of {self.checked:,} ({lost / self.checked:.0%})"
        reasons = dict(self.left_out)
        if self.truncated:
            reasons["truncated"] = self.truncated
        advice = []
        if self.too_long:
            fitting = self._fitting_length(extra)
            advice.append(
                f"train.max_length is {max_length}, and {fitting} would hold {_SHOULD_FIT:.0%} of"
                " the rows"
            )
            if self.left_out.get(TOO_LONG):
                advice.append("data.too_long=truncate keeps the beginnings of long rows")
        if left_out > self.left_out.get(TOO_LONG, 0):
            advice.append(
                "the first of the rows that cannot be used are listed above: mend them, or name"
                " their columns in data.columns"
            )
        return [f"{self.what}: {share} are lost: {_reasons(reasons)}; {'; '.join(advice)}"]

    def _fitting_length(self, extra: int) -> int:
        """The `max_length` that would hold most rows."""
        sizes = sorted(self.too_long, reverse=True)
        may_stay_out = math.floor((1 - _SHOULD_FIT) * self.checked)
        return sizes[min(may_stay_out, len(sizes) - 1)] - extra

    def to_mapping(self) -> dict[str, Any]:
        """The totals as JSON can hold them, for `summary.json`."""
        return {
            "source": self.origin.name,
            "split": self.origin.split or None,
            "rows_in_source": self.origin.rows,
            "held_out": self.origin.held_out,
            "set_aside": self.origin.set_aside,
            "rows": self.rows,
            "checked": self.checked,
            "used": self.used,
            "left_out": dict(self.left_out),
            "truncated": self.truncated,
        }


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in counts.items())
