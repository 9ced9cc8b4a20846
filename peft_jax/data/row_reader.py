"""Reads rows as examples and token sequences, and reports rows that cannot be used."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

from peft_jax.data.bad_rows import (
    BadRowError,
    BadRows,
    UnusableRowsError,
    as_bad_row,
    check_unicode,
)
from peft_jax.data.batch import AnyBatch
from peft_jax.data.encode import TOO_LONG, Encoder
from peft_jax.data.examples import Conversation, Example
from peft_jax.data.labeled import LabeledEncoder
from peft_jax.data.packing import fill_row
from peft_jax.data.recipes import Recipe
from peft_jax.data.rows import Row
from peft_jax.data.settings import DataSettings
from peft_jax.data.tables import Table

_log = logging.getLogger(__name__)

_TEMPLATE = "chat template"
"""Reason of rows that the chat template rejects or fails on."""


class RowReader:
    """Reads rows, and turns them into examples and token sequences."""

    def __init__(self, recipe: Recipe, encoder: Encoder | LabeledEncoder, settings: DataSettings):
        self.recipe = recipe
        self.encoder = encoder
        self.settings = settings

    def example(self, table: Table, index: int) -> Example | Conversation:
        """Returns the example of a row, as a conversation if `data.chat` is set.

        Raises:
          BadRowError: The row cannot be used.
        """
        with as_bad_row():
            example = self._example(table[index])
            _check_text(example)
            return example

    def encode(self, table: Table, index: int) -> tuple[Example, list[Any]]:
        """Returns the example of a row and its token sequences.

        Raises:
          BadRowError: The row cannot be used.
        """
        example = self.example(table, index)
        with as_bad_row():
            rendered = self.encoder.as_example(example)
            _check_text(rendered)
            return rendered, self.encoder.encode(rendered)

    def lost_characters(self, table: Table, index: int) -> set[str]:
        """Returns the characters of a row that are lost by tokenization.

        Raises:
          BadRowError: The row cannot be used.
        """
        example = self.example(table, index)
        with as_bad_row():
            return self.encoder.lost_characters(example)

    @property
    def tokens_beyond_positions(self) -> int:
        """Number of tokens of a sequence beyond its positions."""
        return 0 if isinstance(self.encoder, LabeledEncoder) else 1

    def _example(self, row: Row) -> Example | Conversation:
        example = self.recipe.example(row)
        if not self.settings.chat or isinstance(example, Conversation):
            return example
        return Conversation(
            messages=(
                {"role": "user", "content": example.prompt},
                {"role": "assistant", "content": example.completion.strip()},
            ),
            answer=example.answer,
            choices=example.choices,
            label=example.label,
        )

    def fill_row(self, sequences: Sequence[Any]) -> AnyBatch:
        """Builds one row from sequences."""
        if isinstance(self.encoder, LabeledEncoder):
            return self.encoder.fill_row(sequences)
        return fill_row(sequences, self.encoder.max_length, self.encoder.pad_id)

    def is_fatal(self, error: BadRowError) -> bool:
        """Returns whether a row with this fault ends the run."""
        if error.reason == TOO_LONG:
            return self.recipe.too_long == "error"
        return self.settings.on_bad_row == "error"

    def describe(self, bad_rows: BadRows, total: int, fallback_advice: str = "") -> str:
        """Returns a message on rows that stop the run, with advice.

        Args:
          bad_rows: Bad rows.
          total: Number of rows that were read.
          fallback_advice: Advice for the case that no row can be used.
        """
        reasons = set(bad_rows.counts)
        if len(bad_rows) < total:
            return f"{bad_rows.describe(total)}\n{self.advice(reasons)}"
        advice = ["No row is left."]
        if TOO_LONG in reasons:
            advice.append(f"Raise train.max_length, or set data.too_long to {self._keeps_long}.")
        if reasons == {_TEMPLATE}:
            advice.append(
                "The chat template rejects all rows: set data.chat_template to another, or provide"
                " rows that it accepts."
            )
        if fallback_advice:
            advice.append(fallback_advice)
        return f"{bad_rows.describe(total)}\n{' '.join(advice)}"

    def advice(self, reasons: Collection[str]) -> str:
        """Returns advice against rows with these faults, if other rows can be used."""
        advice = []
        if self.settings.on_bad_row == "error" and set(reasons) - {TOO_LONG}:
            advice.append("Set data.on_bad_row=skip to continue without such rows.")
        if self.recipe.too_long == "error" and TOO_LONG in reasons:
            advice.append(
                "For rows that are too long, raise train.max_length, or set data.too_long to skip,"
                f" {self._keeps_long}."
            )
        return " ".join(advice)

    @property
    def _keeps_long(self) -> str:
        """Values of data.too_long that keep a part of a long row."""
        # A row with one label cannot be split.
        return "truncate" if isinstance(self.encoder, LabeledEncoder) else "truncate or split"


def _check_text(example: Example | Conversation) -> None:
    """Rejects text that no tokenizer accepts."""
    if isinstance(example, Conversation):
        check_unicode((*example.messages, *example.tools))
    else:
        check_unicode((*(piece.text for piece in example.pieces), *example.sentences))


def report_bad_rows(
    bad_rows: BadRows, total: int, reader: RowReader, *, is_fatal: bool, fallback_advice: str = ""
) -> None:
    """Reports the bad rows among those that were read.

    Args:
      bad_rows: Bad rows.
      total: Number of rows that were read.
      reader: Reader of the rows.
      is_fatal: Whether bad rows are an error.
      fallback_advice: Advice for the case that no row can be used.

    Raises:
      UnusableRowsError: Bad rows are an error by the settings, or no row can be used.
    """
    if not len(bad_rows):
        return
    if is_fatal or len(bad_rows) == total:
        raise UnusableRowsError(reader.describe(bad_rows, total, fallback_advice))
    _log.warning("%s", bad_rows.describe(total))
