"""Builds the training stream and the held-out set from settings."""

import collections
import copy
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from peft_jax.data.bad_rows import (
    BadRowError,
    BadRows,
    UnusableRowsError,
    as_bad_row,
    check_unicode,
)
from peft_jax.data.batch import AnyBatch, padding_share
from peft_jax.data.chat import ChatRenderer
from peft_jax.data.encode import TOO_LONG, Encoder
from peft_jax.data.examples import Conversation, Example
from peft_jax.data.labeled import LabeledEncoder
from peft_jax.data.packing import RowsDataset, fill_row, first_fit_decreasing, stack_rows
from peft_jax.data.passes import Lengths, count_rows
from peft_jax.data.recipes import Recipe, get_recipe
from peft_jax.data.recipes.columns import warn_of_unread_columns
from peft_jax.data.settings import DataSettings
from peft_jax.data.sources import Sources, open_sources
from peft_jax.data.tables import MemoryTable, Row, Table
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

_TEMPLATE = "chat template"
"""Reason of rows that the chat template rejects or fails on."""


def build_data(
    settings: DataSettings,
    tokenizer: Any,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    labeled: bool = False,
    say: Callable[[str], None] = _log.info,
) -> tuple["TrainData", "EvalData"]:
    """Builds the training stream and the held-out set of a run.

    With several processes, each builds the whole stream and gives its devices their rows of every
    batch. So batches and stream positions are the same for any number of processes and any mesh.
    Each process tokenizes all rows, in a background thread.

    Args:
      settings: Data settings.
      tokenizer: A transformers tokenizer; a copy is used in a background thread.
      batch_size: B, number of rows per batch over all devices and processes.
      max_length: T, number of positions per row.
      seed: Seed of the order of rows.
      labeled: Whether to build `LabeledBatch`es, for an encoder with a head. A row then holds one
        text or pair of texts, is never packed, and is truncated by default if it is too long.
      say: Called with a message if the check of rows takes long.

    Returns:
      The training stream, an endless iterator of `Batch`es [B, T] with a state; and the held-out
      batches of the same shape, a sequence that is empty if there are no held-out rows.

    Raises:
      ValueError: Settings do not fit the data or each other, or bad rows are an error.
      FileNotFoundError: A path does not exist.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    recipe = get_recipe(settings.recipe).configured(settings)
    sources = open_sources(settings, recipe, seed=seed)
    warn_of_unread_columns(recipe, sources.train)
    # A background thread tokenizes, and a fast tokenizer may fail if two threads use it.
    own_tokenizer = copy.deepcopy(tokenizer)
    encoder: Encoder | LabeledEncoder
    if labeled:
        encoder = LabeledEncoder(own_tokenizer, settings, max_length=max_length)
        settings = dataclasses.replace(settings, packing=False)
    else:
        encoder = _make_encoder(settings, recipe, own_tokenizer, max_length)
    reader = _Reader(recipe, encoder, settings)
    held_out = EvalData(
        MemoryTable([], "no held-out rows") if sources.held_out is None else sources.held_out,
        reader,
        origin=sources.held_out_origin,
        fallback_advice=_without_held_out(settings, sources),
        packing=settings.packing,
        batch_size=batch_size,
    )
    train = TrainData(
        sources.train,
        reader,
        settings,
        origin=sources.train_origin,
        batch_size=batch_size,
        seed=seed,
        say=say,
    )
    return train, held_out


def _without_held_out(settings: DataSettings, sources: Sources) -> str:
    """Returns advice on how to avoid the held-out rows of a run."""
    instead = "evaluate on rows taken from the training rows, set data.hold_out=0.05"
    for name in ("eval_path", "eval_split"):
        if getattr(settings, name):
            return f"To {instead} and leave data.{name} empty."
    train, held_out = sources.train_origin, sources.held_out_origin
    if (train.name, train.split) != (held_out.name, held_out.split):
        return f"To {instead}."
    return "To train without evaluating on held-out rows, set data.hold_out=0."


def _make_encoder(
    settings: DataSettings, recipe: Recipe, tokenizer: Any, max_length: int
) -> Encoder:
    renderer = None
    asked = settings.chat or settings.chat_template or settings.system_prompt
    if asked or recipe.makes_conversations:
        renderer = ChatRenderer(
            tokenizer,
            chat_template=settings.chat_template,
            system_prompt=settings.system_prompt,
            split_special_tokens=settings.split_special_tokens,
        )
    return Encoder(
        tokenizer,
        max_length=max_length,
        completion_only=recipe.completion_only,
        too_long=recipe.too_long,
        renderer=renderer,
        split_special_tokens=settings.split_special_tokens,
    )


class _Reader:
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
        """Returns whether a row with this fault is_fatal the run."""
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
        reader: _Reader,
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
        _report(self.bad_rows, len(read), self._reader, is_fatal=is_fatal)

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


def _report(
    bad_rows: BadRows, total: int, reader: _Reader, *, is_fatal: bool, fallback_advice: str = ""
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


class EvalData(Sequence[AnyBatch]):
    """The held-out batches, the same in every evaluation, and their rows as text.

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
        reader: _Reader,
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
        _report(
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
