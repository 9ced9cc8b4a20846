"""Counts the batch rows that passes over the data fill."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from peft_jax.data.packing import first_fit_decreasing

_PACKED_PASSES = 4
_PACKED_WINDOWS = 256
"""Numbers of passes and windows that are packed at least; more passes are extrapolated."""


class Lengths:
    """Positions of each encoded row's sequences.

    Args:
      rows: Number of rows of the data.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._of_row: dict[int, tuple[int, ...]] = {}
        # Most rows share their lengths with others, so equal tuples are stored once.
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def add(self, row: int, positions: Sequence[int]) -> None:
        """Records the positions of a row's sequences; empty for a row that cannot be used."""
        found = tuple(positions)
        self._of_row[row] = self._known.setdefault(found, found)

    def __len__(self) -> int:
        """Returns the number of recorded rows."""
        return len(self._of_row)

    def __contains__(self, row: object) -> bool:
        """Returns whether a row has been recorded."""
        return row in self._of_row

    def __getitem__(self, row: int) -> tuple[int, ...]:
        """Returns the positions of each sequence of a row."""
        return self._of_row[row]

    @property
    def whole(self) -> bool:
        """Whether every row of the data has been recorded."""
        return len(self) == self._rows

    @property
    def usable(self) -> int:
        """Number of recorded rows that have a sequence."""
        return sum(1 for positions in self._of_row.values() if positions)

    @property
    def sequences(self) -> int:
        """Number of sequences of all recorded rows."""
        return sum(len(positions) for positions in self._of_row.values())

    def __iter__(self) -> Iterator[int]:
        """Yields the recorded rows, in the order of recording."""
        return iter(self._of_row)


def count_rows(
    lengths: Lengths,
    order: Iterator[int],
    passes: float,
    *,
    packing: bool,
    window: int,
    max_length: int,
) -> int:
    """Returns the number of batch rows that `passes` over the usable rows fill.

    Without packing, every sequence fills a row. With packing, the windows of the stream are packed
    in the same way as the stream does. The last window counts in proportion to its part of the last
    pass. Only the first few passes are packed, and more are extrapolated. The result depends on the
    data, the settings and the seed alone, so it is the same on every process and in a resumed run.

    Args:
      lengths: Positions of each row of `order`.
      order: Endless order of the rows in the stream.
      passes: Number of passes, which may be fractional.
      packing: Whether several sequences share a row.
      window: Number of rows of the data that are packed together.
      max_length: Number of positions per row.

    Example:
      >>> lengths = Lengths(3)
      >>> for row, positions in enumerate([(3,), (5,), (2, 4)]):
      ...     lengths.add(row, positions)
      >>> options = {"window": 3, "max_length": 8}
      >>> count_rows(lengths, itertools.cycle(range(3)), 1.5, packing=False, **options)
      6
      >>> count_rows(lengths, itertools.cycle(range(3)), 1.5, packing=True, **options)
      4
    """
    if not packing:
        return math.ceil(_exact(passes * lengths.sequences))
    wanted = math.ceil(_exact(passes * lengths.usable))
    packed = left = min(wanted, max(_PACKED_PASSES * lengths.usable, _PACKED_WINDOWS * window))
    usable = (row for row in order if lengths[row])
    rows = 0
    while left > 0:
        taken = itertools.islice(usable, window)
        positions = [length for row in taken for length in lengths[row]]
        bins = len(first_fit_decreasing(positions, max_length))
        rows += bins if left >= window else math.ceil(bins * left / window)
        left -= window
    return math.ceil(_exact(rows * (wanted / packed)))


def _exact(number: float) -> float:
    """Removes the rounding error of a product, which would make `ceil` too large by one.

    Example:
      >>> 0.07 * 100, _exact(0.07 * 100)
      (7.000000000000001, 7.0)
    """
    return float(np.round(number, 6))
