"""Arranges sequences in rows of fixed length, packed or one per row."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grain
import numpy as np

from peft_jax.data.batch import AnyBatch, Batch
from peft_jax.data.encode import Encoded

_Row = TypeVar("_Row", bound=AnyBatch)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins: the longest first, each into the first bin that has room.

    It uses at most 11/9 of the optimal number of bins, plus 6/9 (Dósa, 2007).

    Args:
      lengths: Length of each item, from 1 to `capacity`.
      capacity: Capacity of a bin.

    Returns:
      Indices of the items in each bin.

    Raises:
      ValueError: An item is longer than `capacity`.

    Example:
      >>> first_fit_decreasing([3, 5, 2, 4], 7)
      [[1, 2], [3, 0]]
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"an item of length {sizes.max()} does not fit a bin of {capacity}")
    free = np.zeros(len(sizes), np.int64)
    bins: list[list[int]] = []
    for item in np.argsort(-sizes, kind="stable").tolist():
        fits = free[: len(bins)] >= sizes[item]
        chosen = int(np.argmax(fits)) if fits.any() else len(bins)
        if chosen == len(bins):
            bins.append([])
            free[chosen] = capacity
        bins[chosen].append(item)
        free[chosen] -= sizes[item]
    return bins


def fill_row(sequences: Sequence[Encoded], max_length: int, pad_id: int) -> Batch:
    """Builds one row of consecutive sequences, padded on the right.

    Args:
      sequences: Sequences. Each of n tokens takes n - 1 positions: all but the last are inputs,
        all but the first are targets.
      max_length: T.
      pad_id: Padding of `tokens` and `targets`.

    Returns:
      A `Batch` of fields [T].
    """
    tokens = np.full(max_length, pad_id, np.int32)
    targets = np.full(max_length, pad_id, np.int32)
    loss_mask = np.zeros(max_length, np.float32)
    positions = np.zeros(max_length, np.int32)
    segment_ids = np.zeros(max_length, np.int32)
    start = 0
    for number, sequence in enumerate(sequences, start=1):
        stop = start + sequence.positions
        tokens[start:stop] = sequence.ids[:-1]
        targets[start:stop] = sequence.ids[1:]
        loss_mask[start:stop] = sequence.loss_mask[1:]
        positions[start:stop] = np.arange(sequence.positions)
        segment_ids[start:stop] = number
        start = stop
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=loss_mask,
        positions=positions,
        segment_ids=segment_ids,
    )


def stack_rows(rows: Sequence[_Row]) -> _Row:
    """Stacks rows [T] to a batch [B, T]."""
    kind = type(rows[0])
    fields = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: np.stack([getattr(row, name) for row in rows]) for name in fields})


class RowsDataset(grain.IterDataset):
    """Builds rows of fixed length from an endless stream of token sequences.

    The elements of the stream are lists of sequences, since a row of the data may give several.
    With packing, the sequences of a window of elements are packed into rows, which are yielded in
    random order. Without packing, every sequence is a row, in order.

    The state is the stream's state at the start of the window, and the number of its rows yielded
    so far. Resuming reads that window again.
    """

    def __init__(
        self,
        parent: grain.IterDataset,
        *,
        max_length: int,
        fill: Callable[[Sequence[Any]], AnyBatch],
        packing: bool,
        window: int,
        shuffle: bool,
        seed: int,
    ):
        """Wraps the stream.

        Args:
          parent: Stream of lists of `Encoded`.
          max_length: T.
          fill: Builds a row from its sequences.
          packing: Whether several sequences share a row.
          window: Number of elements that are packed together.
          shuffle: Whether to yield a window's rows in random order.
          seed: Seed of that order.
        """
        super().__init__(parent)
        self.max_length = max_length
        self.fill = fill
        self.packing = packing
        self.window = window if packing else 1
        self.shuffle = shuffle
        self.seed = seed

    def __iter__(self) -> grain.DatasetIterator:
        """Returns the iterator of rows."""
        return _RowsIterator(iter(self._parent), self)


class _RowsIterator(grain.DatasetIterator):
    """Iterator of `RowsDataset`."""

    def __init__(self, parent: grain.DatasetIterator, dataset: RowsDataset):
        super().__init__(parent)
        self._dataset = dataset
        self._restart(window=0, row=0)

    def _restart(self, *, window: int, row: int) -> None:
        """Starts a window at the parent's present state, after its first `row` rows."""
        self._window_state = self._parent.get_state()
        self._window = window
        self._row = row
        self._rows: list[list[Any]] | None = None

    def __next__(self) -> AnyBatch:
        if self._rows is None:
            self._rows = self._next_window()
        row = self._rows[self._row]
        if self._row + 1 < len(self._rows):
            self._row += 1
        else:
            self._restart(window=self._window + 1, row=0)
        return self._dataset.fill(row)

    def _next_window(self) -> list[list[Any]]:
        dataset = self._dataset
        sequences = [sequence for _ in range(dataset.window) for sequence in next(self._parent)]
        if not dataset.packing:
            return [[sequence] for sequence in sequences]
        lengths = [sequence.positions for sequence in sequences]
        bins = first_fit_decreasing(lengths, dataset.max_length)
        order: Iterator[int] = iter(range(len(bins)))
        if dataset.shuffle:
            generator = np.random.default_rng([dataset.seed, self._window])
            order = iter(generator.permutation(len(bins)).tolist())
        return [[sequences[item] for item in bins[index]] for index in order]

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._window_state, "window": self._window, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._restart(window=int(state["window"]), row=int(state["row"]))
