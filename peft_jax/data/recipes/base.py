"""A recipe: how a row becomes a prompt and an answer, and how a prediction is scored."""

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from peft_jax.core import did_you_mean
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Conversation, Example, prompt_and_completion
from peft_jax.data.files import Layout, find_splits, open_file, open_files
from peft_jax.data.settings import DataSettings, TooLong
from peft_jax.data.tables import Row, Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubHome:
    """Where a recipe's data lives on the Hugging Face hub.

    Attributes:
      path: the data set's name.
      subset: its configuration.
    """

    path: str
    subset: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A prompt and an answer made of a row's fields, by two templates.

    A recipe that needs more than templates is a subclass with its own `example`.

    Attributes:
      name: what `data.recipe` calls it.
      about: one line on the task.
      fields: the columns each field is read from: the first that is not null.
      optional: the fields that may be missing or empty.
      prompt: the prompt, with fields in braces.
      completion: the answer, with fields in braces; it begins with the space or line end that
        parts it from the prompt, which ends in neither.
      hub: where the data lives on the hub, for an empty `data.path`.
      headerless: the columns of the layouts that are published without a header.
      train_splits: what the training rows are called, in order of preference.
      eval_splits: what the held-out rows are called, in order of preference.
      completion_only: whether only the answer is learned.
      too_long: what is done with a row of more than the run's length.
      chat_prompt: the prompt where a chat template is put around it; empty: the same.
      metric: the name of what `score` measures; empty where a prediction cannot be scored.
    """

    name: str
    about: str
    fields: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    prompt: str = ""
    completion: str = ""
    hub: HubHome | None = None
    headerless: tuple[tuple[str, ...], ...] = ()
    train_splits: tuple[str, ...] = ("train",)
    eval_splits: tuple[str, ...] = ("validation", "test")
    completion_only: bool = True
    too_long: TooLong = "skip"
    chat_prompt: str = ""
    metric: str = ""

    templated: ClassVar[bool] = True
    """Whether the recipe's prompt and completion are templates that settings may replace."""

    makes_conversations: ClassVar[bool] = False
    """Whether the recipe's rows need a chat template."""

    def configured(self, settings: DataSettings) -> "Recipe":
        """The recipe with what the settings replace.

        Raises:
          ValueError: if a setting names a field that the recipe does not have, or does not apply.
        """
        for field in settings.columns:
            if field not in self.fields:
                raise ValueError(
                    f"data.columns names {field!r}, which recipe {self.name!r} does not read"
                    f"{did_you_mean(field, self.fields)}"
                )
        if settings.label_words:
            raise ValueError(f"data.label_words: recipe {self.name!r} has no labels")
        changes: dict[str, Any] = {
            "fields": {**self.fields, **{key: (name,) for key, name in settings.columns.items()}}
        }
        if settings.chat and self.chat_prompt:
            changes["prompt"] = self.chat_prompt
        for key in ("prompt", "completion"):
            template = getattr(settings, f"{key}_template")
            if template is not None:
                self._check_template(f"data.{key}_template", template)
                changes[key] = template
        if settings.completion_only is not None:
            changes["completion_only"] = settings.completion_only
        if settings.too_long is not None:
            changes["too_long"] = settings.too_long
        return dataclasses.replace(self, **changes)

    def hub_home(self, settings: DataSettings) -> HubHome | None:
        """Where the data lives on the hub."""
        return self.hub

    @property
    def layout(self) -> Layout:
        """What is known of the columns of the recipe's files."""
        known = tuple(name for names in self.fields.values() for name in names)
        return Layout(known=known, headerless=self.headerless)

    def open_file(self, path: Path, settings: DataSettings) -> Table:
        """The rows of one local file."""
        return open_file(path, settings, self.layout)

    def find_splits(self, folder: Path, settings: DataSettings) -> dict[str, Callable[[], Table]]:
        """What opens each split that is found in a local folder."""
        files = find_splits(folder, self.unwanted_words(settings))
        return {
            split: functools.partial(open_files, paths, settings, self.layout)
            for split, paths in files.items()
        }

    def unwanted_words(self, settings: DataSettings) -> tuple[str, ...]:
        """Words by which a folder's files are passed over, such as other languages."""
        return ()

    def aligned_subsets(self, settings: DataSettings) -> dict[str, str]:
        """By column, the hub subset it comes from, where one row is spread over several subsets."""
        return {}

    def languages(self, settings: DataSettings) -> tuple[tuple["Recipe", DataSettings], ...]:
        """The recipe and the settings for each language that a run's rows are in.

        One pair, unless the settings name several languages. Each language's rows are opened by
        themselves and then joined.
        """
        return ((self, settings),)

    def joinable(self, table: Table) -> Table:
        """A language's rows in a form in which those of several languages can be joined."""
        return table

    def example(self, row: Row) -> Example | Conversation:
        """What is made of a row.

        Raises:
          BadRowError: if the row cannot be used.
        """
        values = self.read(row)
        completion = self.completion.format(**values)
        return prompt_and_completion(
            self.prompt.format(**values), completion, answer=completion.strip()
        )

    def read(self, row: Row) -> dict[str, str]:
        """The row's fields as text.

        Raises:
          BadRowError: if one is missing, empty, or no text.
        """
        return {field: self.read_text(row, field) for field in self.fields}

    def read_text(self, row: Row, field: str) -> str:
        """One field as text; "" for an optional one that the row does not have."""
        value = self.read_value(row, field)
        if value is None and field in self.optional:
            return ""
        if not isinstance(value, str):
            raise BadRowError(
                "wrong type", f"field {field!r} is a {type(value).__name__}, and should be text"
            )
        if not value.strip() and field not in self.optional:
            raise BadRowError("empty", f"field {field!r} is empty")
        return value

    def read_value(self, row: Row, field: str) -> Any:
        """One field as it is, from the first of its columns that is not null.

        Returns:
          None where all of them are null, or an optional field has none of them in the row.

        Raises:
          BadRowError: if a field that is not optional has none of them in the row.
        """
        columns = [column for column in self.fields[field] if column in row]
        for column in columns:
            if row[column] is not None:
                return row[column]
        if columns or field in self.optional:
            return None
        wanted = " or ".join(repr(column) for column in self.fields[field])
        raise BadRowError(
            "missing field", f"no column {wanted}{did_you_mean(self.fields[field][0], row)}"
        )

    @property
    def num_labels(self) -> int:
        """How many outputs a classifier's head has for this task; 0 where it is none for one."""
        return 0

    def answer_of(self, output: float) -> str:
        """What a classifier's output stands for, as the answers of `metrics`.

        Args:
          output: the number of the likeliest label or, in a regression, the number.

        Raises:
          ValueError: if the task is none for a classifier.
        """
        raise ValueError(f"recipe {self.name!r} has no labels and no numbers for a classifier")

    def score(self, prediction: str, example: Example) -> float:
        """How good a generated answer is, from 0 to 1; see `metric` for what is measured.

        Args:
          prediction: what the model generated after `example.prompt`.
          example: what it should have said.

        Raises:
          ValueError: if the recipe's answers cannot be scored.
        """
        raise ValueError(f"recipe {self.name!r} has no score: its answers have no one right form")

    def metrics(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """The task's measures over a whole set of predictions, by name.

        Empty where the recipe's answers cannot be scored.
        """
        if not self.metric or not examples:
            return {}
        scores = [self.score(*pair) for pair in zip(predictions, examples, strict=True)]
        return {self.metric: sum(scores) / len(scores)}

    def _check_template(self, setting: str, template: str) -> None:
        if not self.templated:
            raise ValueError(f"{setting}: recipe {self.name!r} takes no templates")
        known = self.template_fields()
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(
                f"{setting} is {template!r}: {error}; a brace that stands for itself is written"
                " twice, {{ or }}"
            ) from None
        for _, field, _, _ in parts:
            if field is not None and field not in known:
                raise ValueError(
                    f"{setting} has the field {{{field}}}, which recipe {self.name!r} does not have"
                    f"{did_you_mean(field, known)}"
                )

    def template_fields(self) -> tuple[str, ...]:
        """What a template may have in braces."""
        return tuple(self.fields)
