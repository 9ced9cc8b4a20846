"""Base class of recipes, which turn rows into prompts and answers and score predictions."""

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from peft_jax.core import did_you_mean
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.data_files import Layout, find_splits, open_file, open_files
from peft_jax.data.examples import Conversation, Example, prompt_and_completion
from peft_jax.data.rows import Row
from peft_jax.data.settings import DataSettings, TooLong
from peft_jax.data.tables import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubHome:
    """A data set on the Hugging Face hub.

    Attributes:
      path: Name of the data set.
      subset: Configuration of the data set.
    """

    path: str
    subset: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats a row's fields as a prompt and an answer, by two templates.

    A recipe that needs more than templates is a subclass with its own `example`.

    Attributes:
      name: Name in `data.recipe`.
      about: One line on the task.
      fields: Columns of each field; the first that is not null is read.
      optional: Fields that may be missing or empty.
      prompt: Template of the prompt, with fields in braces.
      completion: Template of the answer, with fields in braces. It begins with the space or line
        end that separates it from the prompt.
      hub: Data set on the hub for an empty `data.path`.
      headerless: Columns of layouts that are published without a header.
      train_splits: Names of the training split, in order of preference.
      eval_splits: Names of the held-out split, in order of preference.
      completion_only: Whether only the answer's tokens are in the loss.
      too_long: Treatment of a row that exceeds the run's length.
      chat_prompt: Template of the prompt within a chat template; empty: `prompt`.
      metric: Name of the metric of `score`; empty if predictions cannot be scored.
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
    """Whether settings may replace the templates of prompt and completion."""

    makes_conversations: ClassVar[bool] = False
    """Whether rows need a chat template."""

    def configured(self, settings: DataSettings) -> "Recipe":
        """Returns the recipe with the settings applied.

        Raises:
          ValueError: A setting does not apply to the recipe, or names an unknown field.
        """
        for field in settings.columns:
            if field not in self.fields:
                raise ValueError(
                    f"data.columns has the field {field!r}, which recipe {self.name!r} does not"
                    f" have{did_you_mean(field, self.fields)}"
                )
        if settings.label_words:
            raise ValueError(
                f"data.label_words is {settings.label_words}, but recipe {self.name!r} has no"
                " labels"
            )
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
        """Returns the data set on the hub, if the recipe has one."""
        return self.hub

    @property
    def layout(self) -> Layout:
        """Columns of the recipe's files."""
        known = tuple(name for names in self.fields.values() for name in names)
        return Layout(known=known, headerless=self.headerless)

    def open_file(self, path: Path, settings: DataSettings) -> Table:
        """Opens one local file."""
        return open_file(path, settings, self.layout)

    def find_splits(self, folder: Path, settings: DataSettings) -> dict[str, Callable[[], Table]]:
        """Returns functions that open each split of a local folder."""
        files = find_splits(folder, self.unwanted_words(settings))
        return {
            split: functools.partial(open_files, paths, settings, self.layout)
            for split, paths in files.items()
        }

    def unwanted_words(self, settings: DataSettings) -> tuple[str, ...]:
        """Returns words in file names that exclude a file, such as other languages."""
        return ()

    def aligned_subsets(self, settings: DataSettings) -> dict[str, str]:
        """Returns the hub subset of each column, if a row combines several subsets."""
        return {}

    def languages(self, settings: DataSettings) -> tuple[tuple["Recipe", DataSettings], ...]:
        """Returns the recipe and the settings of each language of the run.

        There is one pair, unless the settings name several languages. The rows of each language are
        opened separately and then joined.
        """
        return ((self, settings),)

    def joinable(self, table: Table) -> Table:
        """Converts the rows of a language to a form that can be joined with other languages."""
        return table

    def example(self, row: Row) -> Example | Conversation:
        """Returns the example of a row.

        Raises:
          BadRowError: The row cannot be used.
        """
        values = self.read(row)
        completion = self.completion.format(**values)
        return prompt_and_completion(
            self.prompt.format(**values), completion, answer=completion.strip()
        )

    def read(self, row: Row) -> dict[str, str]:
        """Reads the row's fields as text.

        Raises:
          BadRowError: A field is missing, empty, or not text.
        """
        return {field: self.read_text(row, field) for field in self.fields}

    def read_text(self, row: Row, field: str) -> str:
        """Reads one field as text; "" for a missing optional field.

        Raises:
          BadRowError: The field is missing, empty, or not text.
        """
        value = self.read_value(row, field)
        if value is None and field in self.optional:
            return ""
        if not isinstance(value, str):
            raise BadRowError(
                "wrong type", f"field {field!r} is a {type(value).__name__}, but must be text"
            )
        if not value.strip() and field not in self.optional:
            raise BadRowError("empty", f"field {field!r} is empty")
        return value

    def read_value(self, row: Row, field: str) -> Any:
        """Reads one field from the first of its columns that is not null.

        Returns:
          The value, or None if all columns are null, or if an optional field has no column.

        Raises:
          BadRowError: The row has no column of a required field.
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
        """Number of outputs of a classifier's head; 0 if the task is not for classifiers."""
        return 0

    def answer_of(self, output: float) -> str:
        """Returns the answer for a classifier's output, in the form that `metrics` reads.

        Args:
          output: Index of the likeliest label or, in a regression, the number.

        Raises:
          ValueError: The task is not for classifiers.
        """
        raise ValueError(f"recipe {self.name!r} has no labels or numbers for a classifier")

    def score(self, prediction: str, example: Example) -> float:
        """Returns the score of a generated answer, from 0 to 1; `metric` names the score.

        Args:
          prediction: Text that the model generated after `example.prompt`.
          example: Example with the reference.

        Raises:
          ValueError: The recipe's answers cannot be scored.
        """
        raise ValueError(f"recipe {self.name!r} has no score, since many answers may be correct")

    def metrics(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Returns the task's metrics over a set of predictions, by name.

        Empty if the recipe's answers cannot be scored.
        """
        if not self.metric or not examples:
            return {}
        scores = [self.score(*pair) for pair in zip(predictions, examples, strict=True)]
        return {self.metric: sum(scores) / len(scores)}

    def _check_template(self, setting: str, template: str) -> None:
        if not self.templated:
            raise ValueError(
                f"{setting} is {template!r}, but recipe {self.name!r} has no templates to replace"
            )
        known = self.template_fields()
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(
                f"{setting} is {template!r}: {error}; write literal braces twice, {{{{ or }}}}"
            ) from None
        for _, field, _, _ in parts:
            if field is not None and field not in known:
                raise ValueError(
                    f"{setting} has the field {{{field}}}, which recipe {self.name!r} does not have"
                    f"{did_you_mean(field, known)}"
                )

    def template_fields(self) -> tuple[str, ...]:
        """Returns the names that a template may have in braces."""
        return tuple(self.fields)
