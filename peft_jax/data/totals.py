"""Counts the rows of a run: how many are used, and why others are left out."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft_jax.data.encode import TOO_LONG

_TOO_MANY_LOST = 0.1
"""Share of lost rows above which a warning suggests changes."""

_SHOULD_FIT = 0.95
"""Share of rows that fit the `train.max_length` suggested by a warning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Source of some rows.

    Attributes:
      name: Files, or a data set on the hub.
      split: Split of the rows; empty for a single file.
      rows: Number of rows in the source.
      held_out: Number of rows held out for evaluation.
      set_aside: Number of rows excluded by `data.train_rows` or `data.eval_rows`.
      chosen: Whether a setting names the split.
    """

    name: str
    split: str = ""
    rows: int = 0
    held_out: int = 0
    set_aside: int = 0
    chosen: bool = True

    def __str__(self) -> str:
        """Returns the name with the split.

        Example:
          >>> str(Origin(name="data/train.jsonl", split="train", rows=10))
          'data/train.jsonl (split train)'
        """
        return f"{self.name} (split {self.split})" if self.split else self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTotals:
    """Counts of a run's rows.

    Attributes:
      what: Name of the rows in messages, such as "training rows".
      origin: Source of the rows.
      rows: Number of rows that the run takes from the source.
      checked: Number of distinct rows encoded so far.
      used: Number of encoded rows that can be used.
      left_out: Number of rows that cannot be used, by reason.
      truncated: Number of used rows that were truncated.
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
        """Returns the totals as a line of text.

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
        """Returns how many of the checked rows are used, and why others are not."""
        parts = [f"{self.used:,} used"]
        if lost := sum(self.left_out.values()):
            parts.append(f"{lost:,} left out ({_reasons(self.left_out)})")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        return ", ".join(parts)

    def warnings(self, *, max_length: int, extra: int) -> list[str]:
        """Returns warnings to show before the run begins.

        Args:
          max_length: Number of positions per row.
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
            f"there is no split named train, so the {self.what} are those of {origin}; set"
            " data.train_split to choose a split"
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
                f"train.max_length is {max_length}; {fitting} would fit {_SHOULD_FIT:.0%} of the"
                " rows"
            )
            if self.left_out.get(TOO_LONG):
                advice.append("data.too_long=truncate keeps the start of long rows")
        if left_out > self.left_out.get(TOO_LONG, 0):
            advice.append(
                "the first bad rows are listed above: correct them, or set their columns in"
                " data.columns"
            )
        return [f"{self.what}: {share} are lost: {_reasons(reasons)}; {'; '.join(advice)}"]

    def _fitting_length(self, extra: int) -> int:
        """Returns the smallest `max_length` that fits the share `_SHOULD_FIT` of rows."""
        sizes = sorted(self.too_long, reverse=True)
        may_stay_out = math.floor((1 - _SHOULD_FIT) * self.checked)
        return sizes[min(may_stay_out, len(sizes) - 1)] - extra

    def to_mapping(self) -> dict[str, Any]:
        """Returns the totals as JSON values, for `summary.json`."""
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
