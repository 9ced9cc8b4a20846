"""What a run says about its data."""

import dataclasses
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
    """Where the rows come from, what is made of them, and how they reach the model.

    Attributes:
      recipe: how a row becomes a prompt and an answer; a name in `peft_jax.data.RECIPES`.
      path: a data file, a folder of them, or a data set's name on the Hugging Face hub. Empty: the
        recipe's own set on the hub.
      subset: the configuration of a hub data set ("main", "sst2"); empty: the recipe's own.
      revision: the revision of a hub data set; empty: the newest.
      train_split: the rows to train on; empty: "train", or what the recipe names instead. For a
        folder, the part of a file's name ("train.jsonl", "train-00000-of-00002.parquet").
      eval_path: held-out rows from another file, folder or hub data set; empty: from `path`.
      eval_split: the split to evaluate on; empty: "validation" or "test", whichever there is.
      hold_out: held-out rows taken from the training rows: a fraction below 1, or a number of rows;
        0 takes none. None: taken only where there are no other held-out rows, one row in twenty and
        at most 512.
      hold_out_seed: which rows are taken; it is not the run's seed, so that runs with different
        seeds are measured on the same rows.
      train_rows: use at most so many training rows; None: all.
      train_rows_by_seed: Whether the run's seed chooses the rows of `train_rows`, so that runs with
        different seeds take different rows. False: every run takes the same rows, chosen by
        `hold_out_seed`. Held-out rows are the same either way.
      eval_rows: use at most so many held-out rows; None: all.
      columns: the data's own name for a field of the recipe, {"question": "body"}.
      column_names: names for the columns of a csv or tsv file that has no header.
      header: whether a csv or tsv file begins with its columns' names. None: found out from the
        first line.
      quoting: whether double quotes enclose fields. None: in csv they do, in tsv they do not (a
        quotation mark at the start of a sentence stays what it is).
      text_unit: what one row of a plain text file is: a line, a paragraph (blank lines between), or
        the whole file.
      language: The language of the xnli recipe; several with commas between ("fr,sw") train on all
        of them in one run.
      source_language: What the flores recipe translates from; several with commas between.
      target_language: What the flores recipe translates to; several with commas between. Each
        source goes with each target but itself.
      prompt_template: replaces the recipe's prompt; its fields stand in braces. None: the recipe's.
      completion_template: replaces the recipe's answer. None: the recipe's.
      label_words: replaces the words that stand for a classification's labels, in their order.
      chat: put prompt and answer through the tokenizer's chat template as one user turn and one
        assistant turn.
      chat_template: a file with a Jinja chat template, used in place of the tokenizer's own.
      system_prompt: a system turn put before conversations that have none.
      split_special_tokens: tokenize a control token that stands in the data's own text
        ("<|im_end|>" in what a user says) as the characters that it is, as transformers'
        `split_special_tokens`. What a chat template writes and what the assistant says keep theirs.
        Generation has a flag of the same name.
      completion_only: learn the answer only. None: as the recipe says.
      too_long: what to do with a row of more than the run's length: "skip" and count it,
        "truncate" it at its end, "split" it into as many sequences as it takes, "error". None:
        "split" for plain text, "skip" for everything else, because an answer without its end
        teaches something that is not in the data.
      on_bad_row: what to do with a row that cannot be used (broken JSON, a missing or empty field,
        a wrong type, an unknown label): "error" stops, "skip" counts it and goes on.
      check_rows: How many training rows are encoded before the first step (read, put through the
        recipe and the chat template, tokenized), to find bad ones at once rather than hours later.
        They are spread evenly over the data, and ten times as many are read and put through the
        recipe alone. None: all. Others are found when they are reached.
      shuffle: a new order every epoch. False: the order of the data.
      packing: put several short sequences into one row, each with its own segment and positions.
      packing_window: how many rows of the data are packed at a time: more leave less padding.
      prefetch: how many batches a background thread prepares; 0: none, all in the caller's thread.
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
            self.hold_out < 0 or (self.hold_out > 1 and self.hold_out != int(self.hold_out))
        ):
            raise ValueError(
                f"data.hold_out is {self.hold_out}; it is a fraction below 1 (0.05), a whole number"
                " of rows (500), or 0 for none"
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
                    " different ones with commas between"
                )
        if self.train_rows_by_seed and self.train_rows is None:
            raise ValueError(
                "data.train_rows_by_seed is True, but data.train_rows is None: all rows are used;"
                " give data.train_rows a number"
            )
        for name in ("eval_path", "eval_split"):
            if getattr(self, name) and self.hold_out:
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r} and data.hold_out is {self.hold_out}:"
                    " give one of the two"
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
    """The names in a text, which have commas between.

    Example:
      >>> split_names("fr, sw")
      ('fr', 'sw')
    """
    return tuple(name.strip() for name in text.split(","))


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"data.{name} is {value!r}{did_you_mean(str(value), known)}")
