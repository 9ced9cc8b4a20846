"""How many rows of a batch one pass over the data fills, and how many steps several passes take."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from peft_jax.data.packing import first_fit_decreasing

_PACKED_PASSES = 4
_PACKED_WINDOWS = 256
"""The least that is packed to count the rows of many passes: passes, or windows."""


class Lengths:
    """The positions that each row's sequences take, for the rows that have been encoded.

    Args:
      rows: Number of rows of the data.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._of_row: dict[int, tuple[int, ...]] = {}
        # Few rows differ from all others, so equal tuples are held once.
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def add(self, row: int, positions: Sequence[int]) -> None:
        """Notes the sequences of a row; none for a row that cannot be used."""
        found = tuple(positions)
        self._of_row[row] = self._known.setdefault(found, found)

    def __len__(self) -> int:
        """Number of rows that have been noted."""
        return len(self._of_row)

    def __contains__(self, row: object) -> bool:
        """Whether a row has been noted."""
        return row in self._of_row

    def __getitem__(self, row: int) -> tuple[int, ...]:
        """The positions of each sequence of a row."""
        return self._of_row[row]

    @property
    def whole(self) -> bool:
        """Whether every row of the data has been noted."""
        return len(self) == self._rows

    @property
    def usable(self) -> int:
        """Number of noted rows that have a sequence."""
        return sum(1 for positions in self._of_row.values() if positions)

    @property
    def sequences(self) -> int:
        """Number of sequences of all noted rows."""
        return sum(len(positions) for positions in self._of_row.values())

    def __iter__(self) -> Iterator[int]:
        """The noted rows, in the order in which they were noted."""
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
    """Returns how many rows of batches the stream fills in so many passes over the usable rows.

    Without packing every sequence fills a row. With packing, the stream packs `window` usable rows
    of the data at a time, and this packs the same windows. Of a window that the last pass ends in,
    the part is counted that belongs to the pass. Passes beyond the first few are not packed, but
    taken to fill as many rows as those. The result depends on the data, the settings and
    the seed alone, so it is the same on every process and whenever a run is resumed.

    Args:
      lengths: what each row of `order` takes.
      order: the rows of the data in the order of the stream, without end.
      passes: Number of passes, which need not be whole.
      packing: whether several sequences share a row.
      window: Number of rows of the data that are packed at a time.
      max_length: positions of a row.

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
    """A product without the rounding error that would take `ceil` one further.

    Example:
      >>> 0.07 * 100, _exact(0.07 * 100)
      (7.000000000000001, 7.0)
    """
    return float(np.round(number, 6))
