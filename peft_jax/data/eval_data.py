"""Batches the held-out rows, and keeps them as text."""

from collections.abc import Sequence
from typing import Any

from peft_jax.data.bad_rows import BadRowError, BadRows
from peft_jax.data.batch import AnyBatch
from peft_jax.data.examples import Example
from peft_jax.data.packing import first_fit_decreasing, stack_rows
from peft_jax.data.row_reader import RowReader, report_bad_rows
from peft_jax.data.tables import Table
from peft_jax.data.totals import Origin, RowTotals


class EvalData(Sequence[AnyBatch]):
    """Holds the held-out batches, the same in every evaluation, and their rows as text.

    The last batch is completed with rows of padding, which are not in the loss.

    Attributes:
      recipe: Recipe of the rows.
      encoder: Encoder of the rows.
      files: Files that the rows are read from.
      bad_rows: Rows that cannot be used.
      examples: The other rows, as text.
      totals: Counts of the rows.
      warnings: Warnings to show before the run begins.
    """

    def __init__(
        self,
        table: Table,
        reader: RowReader,
        *,
        origin: Origin,
        fallback_advice: str,
        packing: bool,
        batch_size: int,
    ):
        """Reads and tokenizes every held-out row.

        Args:
          table: Held-out rows.
          reader: Reader of the rows.
          origin: Source of the rows.
          fallback_advice: Advice for the case that no row can be used.
          packing: Whether several sequences share a row.
          batch_size: Number of rows per batch.
        """
        self.recipe = reader.recipe
        self.files = table.files
        self.encoder: Any = reader.encoder
        self.bad_rows = BadRows("held-out rows")
        self.examples: list[Example] = []
        self._batch_size = batch_size
        sequences: list[Any] = []
        truncated: list[int] = []
        is_fatal = False
        for index in range(len(table)):
            try:
                example, encoded = reader.encode(table, index)
            except BadRowError as error:
                self.bad_rows.add(index, table.where(index), error)
                is_fatal |= reader.is_fatal(error)
                continue
            sequences += encoded
            self.examples.append(example)
            if cut := sum(sequence.truncated for sequence in encoded):
                truncated.append(sum(len(sequence.ids) for sequence in encoded) + cut)
        report_bad_rows(
            self.bad_rows, len(table), reader, is_fatal=is_fatal, fallback_advice=fallback_advice
        )
        self.totals = RowTotals(
            what=self.bad_rows.what,
            origin=origin,
            rows=len(table),
            checked=len(table),
            used=len(self.examples),
            left_out=self.bad_rows.counts,
            truncated=len(truncated),
            too_long=(*self.bad_rows.tokens_of(lambda row: True), *truncated),
        )
        self.warnings = self.totals.warnings(
            max_length=self.encoder.max_length, extra=reader.tokens_beyond_positions
        )
        self._sequences = sequences
        self._fill_row = reader.fill_row
        lengths = [sequence.positions for sequence in sequences]
        self._bins = (
            first_fit_decreasing(lengths, self.encoder.max_length)
            if packing
            else [[index] for index in range(len(sequences))]
        )

    def __len__(self) -> int:
        """Returns the number of batches."""
        return -(-len(self._bins) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        """Returns one batch, or a list of batches for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = (index % len(self)) * self._batch_size
        bins = self._bins[first : first + self._batch_size]
        bins = [*bins, *([[]] * (self._batch_size - len(bins)))]
        return stack_rows([self._fill_row([self._sequences[item] for item in row]) for row in bins])

    @property
    def padding_share(self) -> float:
        """Share of padding over all batches."""
        tokens = sum(sequence.positions for sequence in self._sequences)
        room = len(self) * self._batch_size * self.encoder.max_length
        return 1 - tokens / room if room else 0.0
