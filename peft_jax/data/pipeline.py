"""From settings to batches: the training stream and the held-out set."""

import collections
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

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

_STATE_VERSION = 2
_ROWS_LOOKED_AT = 64
_READ_FOR_ONE_ENCODED = 10
"""So many times the rows that the check encodes are read by it: reading takes far less time."""

_LONG_CHECK = 15.0
"""Seconds after which the check says how long it takes."""

_UNKNOWN, _LEFT_OUT, _USED, _TRUNCATED = range(4)
"""What became of a row."""

_TEMPLATE = "chat template"
"""Why a row cannot be used that the chat template refuses or fails on."""


def build_data(
    settings: DataSettings,
    tokenizer: Any,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    labeled: bool = False,
    say: Callable[[str], None] = logging.info,
) -> tuple["TrainData", "EvalData"]:
    """The training stream and the held-out set of a run.

    Where several processes train together, each of them makes the whole stream and hands its
    devices their rows of every batch: the batches, and a position in the stream, are then the same
    for any number of processes and any mesh. What that costs is tokenizing, in a background thread.

    Args:
      settings: what data, and what is made of it.
      tokenizer: a transformers tokenizer. A copy of it is used, in a background thread.
      batch_size: the rows of a batch, over all devices and processes.
      max_length: T, the positions of a row.
      seed: of the order of the rows.
      labeled: rows for an encoder with a head: `LabeledBatch`es in place of `Batch`es, a text or
        pair of texts to a row (never packed), and long ones truncated where the settings say
        nothing else.
      say: Told of a check that takes long.

    Returns:
      An endless iterator of `Batch`es of [batch_size, max_length] whose state can be taken and set;
      and the held-out batches of the same shape, a sequence that is empty if there are no held-out
      rows.

    Raises:
      ValueError: if settings do not fit the data or each other, or bad rows are to stop the run.
      FileNotFoundError: if a path leads nowhere.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    recipe = get_recipe(settings.recipe).configured(settings)
    sources = open_sources(settings, recipe, seed=seed)
    warn_of_unread_columns(recipe, sources.train)
    # Another thread tokenizes, and a fast tokenizer that two threads use at once may refuse.
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
        otherwise=_without_held_out(settings, sources),
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
    """How to do without the held-out rows of a run."""
    instead = "measure on rows taken from the training rows, set data.hold_out=0.05"
    for name in ("eval_path", "eval_split"):
        if getattr(settings, name):
            return f"To {instead} and leave data.{name} out."
    train, held_out = sources.train_origin, sources.held_out_origin
    if (train.name, train.split) != (held_out.name, held_out.split):
        return f"To {instead}."
    return "To train without measuring on held-out rows, set data.hold_out=0."


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
    """Rows to examples to token sequences."""

    def __init__(self, recipe: Recipe, encoder: Encoder | LabeledEncoder, settings: DataSettings):
        self.recipe = recipe
        self.encoder = encoder
        self.settings = settings

    def example(self, table: Table, index: int) -> Example | Conversation:
        """What the recipe makes of a row, as a conversation if the settings ask for one.

        Raises:
          BadRowError: the row cannot be used, for whatever reason.
        """
        with as_bad_row():
            example = self._example(table[index])
            _check_text(example)
            return example

    def encode(self, table: Table, index: int) -> tuple[Example, list[Any]]:
        """A row as an example and as its token sequences.

        Raises:
          BadRowError: the row cannot be used, for whatever reason.
        """
        example = self.example(table, index)
        with as_bad_row():
            rendered = self.encoder.as_example(example)
            _check_text(rendered)
            return rendered, self.encoder.encode(rendered)

    def lost_characters(self, table: Table, index: int) -> set[str]:
        """The characters of a row that its tokens do not give back.

        Raises:
          BadRowError: the row cannot be used, for whatever reason.
        """
        example = self.example(table, index)
        with as_bad_row():
            return self.encoder.lost_characters(example)

    @property
    def tokens_beyond_positions(self) -> int:
        """Number of tokens of a sequence beyond the positions that it takes."""
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
        """One row of sequences."""
        if isinstance(self.encoder, LabeledEncoder):
            return self.encoder.fill_row(sequences)
        return fill_row(sequences, self.encoder.max_length, self.encoder.pad_id)

    def stops(self, error: BadRowError) -> bool:
        """Whether a row with this fault ends the run."""
        if error.reason == TOO_LONG:
            return self.recipe.too_long == "error"
        return self.settings.on_bad_row == "error"

    def describe(self, bad_rows: BadRows, total: int, otherwise: str = "") -> str:
        """Rows that end the run, and what would help.

        Args:
          bad_rows: those that cannot be used.
          total: Number of rows that were read.
          otherwise: how to do without these rows, where none of them is left.
        """
        reasons = set(bad_rows.counts)
        if len(bad_rows) < total:
            return f"{bad_rows.describe(total)}\n{self.advice(reasons)}"
        advice = ["No row is left."]
        if TOO_LONG in reasons:
            advice.append(f"Raise train.max_length, or set data.too_long to {self._keeps_long}.")
        if reasons == {_TEMPLATE}:
            advice.append(
                "The chat template takes none of the rows: name another in data.chat_template, or"
                " give rows that it takes."
            )
        if otherwise:
            advice.append(otherwise)
        return f"{bad_rows.describe(total)}\n{' '.join(advice)}"

    def advice(self, reasons: Collection[str]) -> str:
        """What would help against rows with these faults, where others can be used."""
        advice = []
        if self.settings.on_bad_row == "error" and set(reasons) - {TOO_LONG}:
            advice.append("Set data.on_bad_row=skip to go on without such rows.")
        if self.recipe.too_long == "error" and TOO_LONG in reasons:
            advice.append(
                "For rows that are too long, raise train.max_length, or set data.too_long to skip,"
                f" {self._keeps_long}."
            )
        return " ".join(advice)

    @property
    def _keeps_long(self) -> str:
        """The values of data.too_long that use some of a row that is too long."""
        # A row with one label cannot be split.
        return "truncate" if isinstance(self.encoder, LabeledEncoder) else "truncate or split"


def _check_text(example: Example | Conversation) -> None:
    """Rejects text that no tokenizer can be given."""
    if isinstance(example, Conversation):
        check_unicode((*example.messages, *example.tools))
    else:
        check_unicode((*(piece.text for piece in example.pieces), *example.sentences))


class TrainData(Iterator[AnyBatch]):
    """An endless stream of training batches whose state can be taken and set.

    Attributes:
      bad_rows: the rows that could not be used, of those that were met.
      files: the files that the rows are read from.
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
        self._became = np.full(len(table), _UNKNOWN, np.uint8)
        self._truncated: dict[int, int] = {}
        self._lengths = Lengths(len(table))
        self._tried = 0
        self._used = 0
        self._padding = 0.0
        self._batches = 0
        self._check(settings.check_rows)
        self._warn_of_lost_text()
        # What a state is only good for: the same rows, in the same order, cut the same way.
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
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next batch; there always is one.

        Raises:
          ValueError: if a row cannot be used and the settings make that an error, or if none can.
        """
        batch = next(self._iterator)
        self._padding += padding_share(batch)
        self._batches += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, after the last batch that was given out; JSON can hold it."""
        return {**self._identity, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state that `get_state` gave, bit for bit.

        Raises:
          ValueError: if the state belongs to other rows, or another order or cut of them.
        """
        changed = [
            f"{name} was {state.get(name)} and is {value}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"the data is not what it was when its position was saved: {'; '.join(changed)}"
            )
        self._iterator.set_state(state["iterator"])

    def close(self) -> None:
        """Ends the background thread."""
        self._iterator.close()

    @property
    def padding_share(self) -> float:
        """The share of padding in the batches given out so far."""
        return self._padding / max(self._batches, 1)

    def __len__(self) -> int:
        """How many rows the data has."""
        return len(self._table)

    @property
    def totals(self) -> RowTotals:
        """How many rows there are, are used and are left out, of those met so far."""
        counts = np.bincount(self._became, minlength=4)
        left_out = lambda row: self._became[row] == _LEFT_OUT  # noqa: E731
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
        """What a user should know of the rows before the run begins."""
        return self.totals.warnings(
            max_length=self.encoder.max_length, extra=self._reader.tokens_beyond_positions
        )

    def count_steps(self, epochs: float) -> int:
        """Returns the number of steps that so many passes over the usable rows take.

        Encodes the rows that have not been encoded yet. The last batch is filled up from the next
        pass.

        Raises:
          UnusableRowsError: a row cannot be used, and the settings make that an error.
        """
        if not self._lengths.whole:
            self._check(None)
        return -(-self._count_rows(epochs) // self._batch_size)

    def passes(self, steps: int) -> float | None:
        """Returns the number of passes over the usable rows that so many steps make.

        It is estimated from the rows that the check encoded, where these are not all; None where
        it encoded none.
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
        """Number of rows of batches in so many passes over the rows that have been encoded."""
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
        """Encodes rows, so that bad ones are found before the first step and not hours later.

        Args:
          limit: Number of rows to encode, evenly spread over the data; None: all of them. Ten times
            as many are read.
        """
        size = len(self._table)
        encoded = _spread(size, limit)
        read = _spread(size, None if limit is None else limit * _READ_FOR_ONE_ENCODED)
        read = np.union1d(encoded, read)
        stops = False
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
                stops |= self._reader.stops(error)
            if whole:
                self._lengths.add(index, positions)
        _report(self.bad_rows, len(read), self._reader, stops=stops)

    def _warn_of_lost_text(self) -> None:
        """Looks at a few rows for characters that the tokenizer has no token for."""
        number = min(_ROWS_LOOKED_AT, len(self._table))
        lost: collections.Counter[str] = collections.Counter()
        for index in range(0, len(self._table), len(self._table) // number):
            try:
                lost.update(self._reader.lost_characters(self._table, index))
            except BadRowError as error:
                logging.debug("%s: %s", self._table.where(index), error)
        if lost:
            shown = " ".join(character for character, _ in lost.most_common(20))
            logging.warning(
                "The tokenizer has no token for some characters of the data, which the model will"
                " neither see nor write: %s",
                shown,
            )

    def _read(self, index: int) -> list[Any]:
        """A row's token sequences.

        Raises:
          BadRowError: the row cannot be used.
        """
        try:
            _, sequences = self._reader.encode(self._table, index)
        except BadRowError:
            self._became[index] = _LEFT_OUT
            raise
        cut = sum(sequence.cut for sequence in sequences)
        self._became[index] = _TRUNCATED if cut else _USED
        if cut:
            self._truncated[index] = sum(len(sequence.ids) for sequence in sequences) + cut
        return sequences

    def _encode(self, index: int) -> list[Any] | None:
        """A row's token sequences; None if it cannot be used."""
        index = int(index)
        sequences = None
        try:
            sequences = self._read(index)
        except BadRowError as error:
            where = self._table.where(index)
            is_news = self.bad_rows.add(index, where, error)
            if self._reader.stops(error):
                advice = self._reader.advice({error.reason})
                message = f"{self.bad_rows.what}: {where}: {error}\n{advice}"
                raise UnusableRowsError(message) from None
            if is_news:
                logging.warning("%s: skipped %s: %s", self.bad_rows.what, where, error)
        self._tried += 1
        self._used += sequences is not None
        if not self._used and self._tried >= len(self._table):
            raise UnusableRowsError(self._reader.describe(self.bad_rows, len(self.bad_rows)))
        return sequences


def _spread(size: int, number: int | None) -> np.ndarray:
    """int64 [n], at most `number` indices below `size`, evenly spread, the first and the last.

    Example:
      >>> _spread(10, 4).tolist(), _spread(3, None).tolist(), _spread(3, 0).tolist()
      ([0, 3, 6, 9], [0, 1, 2], [])
    """
    if number is None or number >= size:
        return np.arange(size)
    return np.round(np.linspace(0, size - 1, number)).astype(np.int64)


def _report(
    bad_rows: BadRows, total: int, reader: _Reader, *, stops: bool, otherwise: str = ""
) -> None:
    """Says what is wrong with the rows that were read.

    Args:
      bad_rows: those that cannot be used.
      total: Number of rows that were read.
      reader: has read them.
      stops: whether the settings make that an error.
      otherwise: how to do without these rows, where none of them is left.

    Raises:
      UnusableRowsError: if the settings make that an error, or none of the rows can be used.
    """
    if not len(bad_rows):
        return
    if stops or len(bad_rows) == total:
        raise UnusableRowsError(reader.describe(bad_rows, total, otherwise))
    logging.warning("%s", bad_rows.describe(total))


class EvalData(Sequence[AnyBatch]):
    """The held-out batches, always the same ones, and their rows as text.

    The last batch is filled up with rows that hold no token and no loss.

    Attributes:
      recipe: the recipe.
      encoder: the encoder.
      bad_rows: the rows that cannot be used.
      examples: the others, as text.
      totals: how many rows there are, are used and are left out.
      warnings: what a user should know of them before the run begins.
    """

    def __init__(
        self,
        table: Table,
        reader: _Reader,
        *,
        origin: Origin,
        otherwise: str,
        packing: bool,
        batch_size: int,
    ):
        """Reads and tokenizes every held-out row.

        Args:
          table: the rows.
          reader: makes examples and sequences of them.
          origin: where they come from.
          otherwise: how to do without them.
          packing: several sequences to a row.
          batch_size: the rows of a batch.
        """
        self.recipe = reader.recipe
        self.files = table.files
        self.encoder: Any = reader.encoder
        self.bad_rows = BadRows("held-out rows")
        self.examples: list[Example] = []
        self._batch_size = batch_size
        sequences: list[Any] = []
        truncated: list[int] = []
        stops = False
        for index in range(len(table)):
            try:
                example, encoded = reader.encode(table, index)
            except BadRowError as error:
                self.bad_rows.add(index, table.where(index), error)
                stops |= reader.stops(error)
                continue
            sequences += encoded
            self.examples.append(example)
            if cut := sum(sequence.cut for sequence in encoded):
                truncated.append(sum(len(sequence.ids) for sequence in encoded) + cut)
        _report(self.bad_rows, len(table), reader, stops=stops, otherwise=otherwise)
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
        """How many batches there are."""
        return -(-len(self._bins) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        """One batch."""
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
        """The share of padding over all batches."""
        tokens = sum(sequence.positions for sequence in self._sequences)
        room = len(self) * self._batch_size * self.encoder.max_length
        return 1 - tokens / room if room else 0.0
