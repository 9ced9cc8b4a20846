"""Data settings of a run."""

import dataclasses
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal, get_args

from peft_jax.core import did_you_mean
from peft_jax.core.typed_settings import from_mapping

OnBadRow = Literal["error", "skip"]
TooLong = Literal["skip", "truncate", "split", "error"]
TextUnit = Literal["line", "paragraph", "file"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Settings of the source of rows, their formatting, and batching.

    Attributes:
      recipe: Recipe that turns a row into a prompt and an answer; a name in
        `peft_jax.data.RECIPES`.
      path: Data file, folder of them, or name of a data set on the Hugging Face hub. Empty: the
        recipe's own data set on the hub.
      subset: Configuration of a hub data set ("main", "sst2"); empty: the recipe's own.
      revision: Revision of a hub data set; empty: the newest.
      train_split: Split to train on; empty: "train", or the recipe's own. In a folder, a split is
        named by its files ("train.jsonl", "train-00000-of-00002.parquet").
      eval_path: File, folder or hub data set of held-out rows; empty: `path`.
      eval_split: Split to evaluate on; empty: "validation" or "test", whichever exists.
      hold_out: Held-out rows taken from the training rows: a fraction below 1, or a number of rows;
        0 takes none. None: 5% and at most 512 rows, if there are no other held-out rows.
      hold_out_seed: Seed that chooses the held-out rows. It is independent of the run's seed, so
        that runs with different seeds are evaluated on the same rows.
      train_rows: Largest number of training rows; None: all.
      train_rows_by_seed: Whether the run's seed chooses the rows of `train_rows`. False: every run
        uses the same rows, chosen by `hold_out_seed`. Held-out rows are the same either way.
      eval_rows: Largest number of held-out rows; None: all.
      columns: Names of the data's columns by the recipe's fields, {"question": "body"}.
      column_names: Column names of a csv or tsv file without a header.
      header: Whether the first line of a csv or tsv file holds the column names. None: detected
        from that line.
      quoting: Whether double quotes enclose fields. None: True for csv, False for tsv.
      text_unit: Unit of a row of a plain text file: "line", "paragraph" (separated by blank lines)
        or "file".
      language: Language of the xnli recipe. Several, separated by commas ("fr,sw"), are trained on
        in one run.
      source_language: Source language of the flores recipe; several are separated by commas.
      target_language: Target language of the flores recipe; several are separated by commas. Every
        source is paired with every other language among the targets.
      prompt_template: Template that replaces the recipe's prompt, with fields in braces; None: the
        recipe's own.
      completion_template: Template that replaces the recipe's answer; None: the recipe's own.
      label_words: Words that replace those of a classification's labels, in the same order.
      chat: Whether to render prompt and answer by the tokenizer's chat template, as a user turn and
        an assistant turn.
      chat_template: File with a Jinja chat template that replaces the tokenizer's own.
      system_prompt: System turn of conversations that have none.
      split_special_tokens: Whether control tokens in the data's own text ("<|im_end|>" in a user
        turn) are tokenized as characters, as by `split_special_tokens` in transformers. Those that
        the chat template or the assistant writes stay control tokens. Generation has a flag of the
        same name.
      completion_only: Whether only the answer's tokens are in the loss. None: the recipe's own.
      too_long: Treatment of a row that exceeds the run's length: "skip" counts it, "truncate" cuts
        its end, "split" makes several sequences, "error" stops. None: "split" for plain text,
        "skip" otherwise, since a truncated answer would train on an end that is not in the data.
      on_bad_row: Treatment of a row that cannot be used (broken JSON, a missing or empty field, a
        wrong type, an unknown label): "error" stops, "skip" counts it and continues.
      check_rows: Number of training rows that are encoded (read, formatted, tokenized) before the
        first step, to find bad rows early. They are spread evenly over the data. Ten times as many
        are read and formatted only. None: all. Bad rows among the others are found when the stream
        reaches them.
      shuffle: Whether every epoch has a new order. False: the order of the data.
      packing: Whether several short sequences share a row, each with its own segment and positions.
      packing_window: Number of rows of the data that are packed together; more leave less padding.
      prefetch: Number of batches that a background thread prepares; 0: none, without a thread.
    """

    recipe: str
    path: str = ""
    subset: str = ""
    revision: str = ""
    train_split: str = ""
    eval_path: str = ""
    eval_split: str = ""
    hold_out: int | float | None = None
    hold_out_seed: int = 0
    train_rows: int | None = None
    train_rows_by_seed: bool = False
    eval_rows: int | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    column_names: tuple[str, ...] = ()
    header: bool | None = None
    quoting: bool | None = None
    text_unit: TextUnit = "line"
    language: str = "en"
    source_language: str = "eng_Latn"
    target_language: str = "fra_Latn"
    prompt_template: str | None = None
    completion_template: str | None = None
    label_words: tuple[str, ...] = ()
    chat: bool = False
    chat_template: str = ""
    system_prompt: str = ""
    split_special_tokens: bool = False
    completion_only: bool | None = None
    too_long: TooLong | None = None
    on_bad_row: OnBadRow = "error"
    check_rows: int | None = 10_000
    shuffle: bool = True
    packing: bool = True
    packing_window: int = 1024
    prefetch: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", dict(self.columns))
        object.__setattr__(self, "column_names", tuple(self.column_names))
        object.__setattr__(self, "label_words", tuple(self.label_words))
        _check_choice("on_bad_row", self.on_bad_row, get_args(OnBadRow))
        _check_choice("text_unit", self.text_unit, get_args(TextUnit))
        if self.too_long is not None:
            _check_choice("too_long", self.too_long, get_args(TooLong))
        if self.hold_out is not None and (
            not 0 <= self.hold_out < math.inf
            or (self.hold_out > 1 and not float(self.hold_out).is_integer())
        ):
            raise ValueError(
                f"data.hold_out is {self.hold_out}; it must be a fraction below 1 (0.05), a whole"
                " number of rows (500), or 0 for none"
            )
        for name, least in (("packing_window", 1), ("prefetch", 0), ("hold_out_seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"data.{name} is {value}; it must be at least {least}")
        for name, least in (("train_rows", 1), ("eval_rows", 0), ("check_rows", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} is {value}; it must be at least {least}, or None")
        for name in ("language", "source_language", "target_language"):
            languages = split_names(getattr(self, name))
            if not all(languages) or len(set(languages)) < len(languages):
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r}; it must be one language, or"
                    " different ones separated by commas"
                )
        if self.train_rows_by_seed and self.train_rows is None:
            raise ValueError(
                "data.train_rows_by_seed is True, but data.train_rows is None, so all rows are"
                " used; set data.train_rows to a number"
            )
        for name in ("eval_path", "eval_split"):
            if getattr(self, name) and self.hold_out:
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r} and data.hold_out is {self.hold_out};"
                    " set only one of the two"
                )


def dataset(recipe: str, path: str | PathLike[str] = "", **settings: Any) -> DataSettings:
    """Describes the rows that a run trains on; nothing is read yet.

    Args:
      recipe: Name of a recipe, which says how a row becomes a prompt and an answer.
      path: A data file, a folder of them, or a data set's name on the hub; empty: the recipe's own.
      **settings: Other fields of `DataSettings`.

    Raises:
      ValueError: A setting is unknown or wrong.

    Example:
      >>> dataset("alpaca", "rows.jsonl", hold_out=0.1).hold_out
      0.1
    """
    return from_mapping(
        DataSettings, {"recipe": recipe, "path": str(path), **settings}, where="data"
    )


def split_names(text: str) -> tuple[str, ...]:
    """Splits names separated by commas.

    Example:
      >>> split_names("fr, sw")
      ('fr', 'sw')
    """
    return tuple(name.strip() for name in text.split(","))


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"data.{name} is {value!r}{did_you_mean(str(value), known)}")
