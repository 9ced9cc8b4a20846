"""Streams training batches without end, with a state to resume from."""

import collections
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from peft_jax.data.bad_rows import BadRowError, BadRows, UnusableRowsError
from peft_jax.data.batch import AnyBatch, padding_share
from peft_jax.data.packing import RowsDataset, stack_rows
from peft_jax.data.passes import Lengths, count_rows
from peft_jax.data.row_reader import RowReader, report_bad_rows
from peft_jax.data.settings import DataSettings
from peft_jax.data.tables import Table
from peft_jax.data.totals import Origin, RowTotals

_log = logging.getLogger(__name__)

_STATE_VERSION = 2
_ROWS_LOOKED_AT = 64
_READ_FOR_ONE_ENCODED = 10
"""Number of rows read per row encoded by the check; reading is far cheaper."""

_LONG_CHECK = 15.0
"""Seconds after which the check reports its estimated duration."""

_UNKNOWN, _LEFT_OUT, _USED, _TRUNCATED = range(4)
"""Outcome of a row."""


class TrainData(Iterator[AnyBatch]):
    """An endless stream of training batches with a state.

    Attributes:
      bad_rows: Bad rows found so far.
      encoder: Encoder of the rows.
      files: Files that the rows are read from.
    """

    def __init__(
        self,
        table: Table,
        reader: RowReader,
        settings: DataSettings,
        *,
        origin: Origin,
        batch_size: int,
        seed: int,
        say: Callable[[str], None],
    ):
        """Checks the rows and starts the stream; see `build_data` for the arguments."""
        self.bad_rows = BadRows("training rows")
        self.encoder = reader.encoder
        self.files = table.files
        self._table = table
        self._reader = reader
        self._origin = origin
        self._say = say
        self._settings = settings
        self._batch_size = batch_size
        self._outcomes = np.full(len(table), _UNKNOWN, np.uint8)
        self._truncated: dict[int, int] = {}
        self._lengths = Lengths(len(table))
        self._tried = 0
        self._used = 0
        self._padding = 0.0
        self._batches = 0
        self._check(settings.check_rows)
        self._warn_of_lost_text()
        # A state is valid only for the same rows, in the same order, batched in the same way.
        self._identity = {
            "version": _STATE_VERSION,
            "recipe": settings.recipe,
            "rows": len(table),
            "seed": seed,
            "shuffle": settings.shuffle,
            "batch_size": batch_size,
            "max_length": reader.encoder.max_length,
            "packing": settings.packing,
            "packing_window": settings.packing_window,
        }
        order = grain.MapDataset.range(len(table)).seed(seed % 2**32)
        order = order.shuffle() if settings.shuffle else order
        self._order = order.repeat()
        self._window = min(settings.packing_window, len(table))
        sequences = self._order.map(self._encode).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        rows = RowsDataset(
            sequences,
            max_length=reader.encoder.max_length,
            fill=reader.fill_row,
            packing=settings.packing,
            window=self._window,
            shuffle=settings.shuffle,
            seed=seed % 2**32,
        )
        batches = rows.batch(batch_size, batch_fn=stack_rows)
        if settings.prefetch:
            batches = grain.experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=settings.prefetch
            )
        self._iterator = iter(batches)

    def __iter__(self) -> "TrainData":
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """Returns the next batch; the stream never ends.

        Raises:
          UnusableRowsError: A bad row is an error by the settings, or no row can be used.
        """
        batch = next(self._iterator)
        self._padding += padding_share(batch)
        self._batches += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch returned, as JSON values."""
        return {**self._identity, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from a state of `get_state`, with identical batches.

        Raises:
          ValueError: The state belongs to other rows, or to another order or batching of them.
        """
        changed = [
            f"{name} was {state.get(name)} and is {value}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"the data differs from that of the saved position: {'; '.join(changed)}"
            )
        self._iterator.set_state(state["iterator"])

    def close(self) -> None:
        """Ends the background thread."""
        self._iterator.close()

    @property
    def padding_share(self) -> float:
        """Share of padding in the batches returned so far."""
        return self._padding / max(self._batches, 1)

    def __len__(self) -> int:
        """Returns the number of rows of the data."""
        return len(self._table)

    @property
    def totals(self) -> RowTotals:
        """Counts of the rows encoded so far."""
        counts = np.bincount(self._outcomes, minlength=4)
        left_out = lambda row: self._outcomes[row] == _LEFT_OUT  # noqa: E731
        return RowTotals(
            what=self.bad_rows.what,
            origin=self._origin,
            rows=len(self._table),
            checked=int(counts[_LEFT_OUT] + counts[_USED] + counts[_TRUNCATED]),
            used=int(counts[_USED] + counts[_TRUNCATED]),
            left_out=self.bad_rows.counts_of(left_out),
            truncated=int(counts[_TRUNCATED]),
            too_long=(*self.bad_rows.tokens_of(left_out), *self._truncated.values()),
        )

    @property
    def warnings(self) -> list[str]:
        """Warnings to show before the run begins."""
        return self.totals.warnings(
            max_length=self.encoder.max_length, extra=self._reader.tokens_beyond_positions
        )

    def count_steps(self, epochs: float) -> int:
        """Returns the number of steps of `epochs` passes over the usable rows.

        Rows that have not been encoded yet are encoded. The last batch is completed from the next
        pass.

        Raises:
          UnusableRowsError: A bad row is an error by the settings.
        """
        if not self._lengths.whole:
            self._check(None)
        return -(-self._count_rows(epochs) // self._batch_size)

    def passes(self, steps: int) -> float | None:
        """Returns the number of passes over the usable rows in `steps` steps.

        If only some rows were encoded by the check, it is estimated from them. If none was, it is
        None.
        """
        if not self._lengths.usable:
            return None
        share = len(self._lengths) / len(self._table)
        return steps * self._batch_size * share / self._count_rows(1.0)

    @property
    def packing(self) -> bool:
        """Whether several sequences share a row."""
        return self._settings.packing

    @property
    def all_checked(self) -> bool:
        """Whether every row was encoded before the first step."""
        return self._lengths.whole

    def _count_rows(self, passes: float) -> int:
        """Returns the number of batch rows in `passes` passes over the encoded rows."""
        if self._lengths.whole:
            order: Iterator[int] = (int(self._order[index]) for index in itertools.count())
            window = self._window
        else:
            order = itertools.cycle(self._lengths)
            window = min(self._window, self._lengths.usable)
        return count_rows(
            self._lengths,
            order,
            passes,
            packing=self._settings.packing,
            window=window,
            max_length=self.encoder.max_length,
        )

    def _check(self, limit: int | None) -> None:
        """Encodes rows before the first step, to find bad rows early.

        Args:
          limit: Number of rows to encode, evenly spread over the data; None: all. Ten times as
            many are read.
        """
        size = len(self._table)
        encoded = _spread(size, limit)
        read = _spread(size, None if limit is None else limit * _READ_FOR_ONE_ENCODED)
        read = np.union1d(encoded, read)
        is_fatal = False
        began, is_told = time.monotonic(), False
        pairs = zip(read.tolist(), np.isin(read, encoded).tolist(), strict=True)
        for done, (index, whole) in enumerate(pairs):
            spent = time.monotonic() - began
            if spent > _LONG_CHECK and not is_told:
                is_told = True
                self._say(
                    f"encoding {len(encoded):,} of {size:,} training rows before the first step"
                    f" takes about {spent * len(read) / max(done, 1):,.0f} s; data.check_rows is"
                    " another number of rows, and train.epochs takes all of them"
                )
            positions: list[int] = []
            try:
                if whole:
                    positions = [sequence.positions for sequence in self._read(index)]
                else:
                    self._reader.example(self._table, index)
            except BadRowError as error:
                self.bad_rows.add(index, self._table.where(index), error)
                is_fatal |= self._reader.is_fatal(error)
            if whole:
                self._lengths.add(index, positions)
        report_bad_rows(self.bad_rows, len(read), self._reader, is_fatal=is_fatal)

    def _warn_of_lost_text(self) -> None:
        """Warns if the tokenizer has no token for some characters of a sample of rows."""
        number = min(_ROWS_LOOKED_AT, len(self._table))
        lost: collections.Counter[str] = collections.Counter()
        for index in range(0, len(self._table), len(self._table) // number):
            try:
                lost.update(self._reader.lost_characters(self._table, index))
            except BadRowError as error:
                _log.debug("%s: %s", self._table.where(index), error)
        if lost:
            shown = " ".join(character for character, _ in lost.most_common(20))
            _log.warning(
                "The tokenizer has no token for some characters of the data, which the model can"
                " neither read nor write: %s",
                shown,
            )

    def _read(self, index: int) -> list[Any]:
        """Returns a row's token sequences, and records its outcome.

        Raises:
          BadRowError: The row cannot be used.
        """
        try:
            _, sequences = self._reader.encode(self._table, index)
        except BadRowError:
            self._outcomes[index] = _LEFT_OUT
            raise
        cut = sum(sequence.truncated for sequence in sequences)
        self._outcomes[index] = _TRUNCATED if cut else _USED
        if cut:
            self._truncated[index] = sum(len(sequence.ids) for sequence in sequences) + cut
        return sequences

    def _encode(self, index: int) -> list[Any] | None:
        """Returns a row's token sequences; None if it cannot be used."""
        index = int(index)
        sequences = None
        try:
            sequences = self._read(index)
        except BadRowError as error:
            where = self._table.where(index)
            is_news = self.bad_rows.add(index, where, error)
            if self._reader.is_fatal(error):
                advice = self._reader.advice({error.reason})
                message = f"{self.bad_rows.what}: {where}: {error}\n{advice}"
                raise UnusableRowsError(message) from None
            if is_news:
                _log.warning("%s: skipped %s: %s", self.bad_rows.what, where, error)
        self._tried += 1
        self._used += sequences is not None
        if not self._used and self._tried >= len(self._table):
            raise UnusableRowsError(self._reader.describe(self.bad_rows, len(self.bad_rows)))
        return sequences


def _spread(size: int, number: int | None) -> np.ndarray:
    """Returns int64 [n], at most `number` indices below `size`, evenly spread from first to last.

    Example:
      >>> _spread(10, 4).tolist(), _spread(3, None).tolist(), _spread(3, 0).tolist()
      ([0, 3, 6, 9], [0, 1, 2], [])
    """
    if number is None or number >= size:
        return np.arange(size)
    return np.round(np.linspace(0, size - 1, number)).astype(np.int64)
