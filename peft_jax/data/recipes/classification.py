"""Formats classification as text: a prompt, and a word per label."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_jax.core import did_you_mean
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Example, prompt_and_completion
from peft_jax.data.recipes.base import Recipe
from peft_jax.data.recipes.measures import f1, matthews_correlation
from peft_jax.data.rows import Row
from peft_jax.data.settings import DataSettings

_UNLABELED = (-1, "-1", "-", "")
"""Values of a missing label in published sets: test splits, and disagreeing annotators."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """A label.

    Attributes:
      word: Word that the model generates for it.
      names: Its names in data besides its number, in lower case.
    """

    word: str
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Recipe):
    """Classifies a row; the answer is the word of its label.

    Attributes:
      labels: Labels in the order of their numbers in the data.
      measures: Metrics besides accuracy: "f1" (of label 1) and "matthews_correlation".
    """

    labels: tuple[Label, ...]
    completion: str = " {label}"
    measures: tuple[str, ...] = ()
    metric: str = "accuracy"

    def configured(self, settings: DataSettings) -> "Recipe":
        """Returns the recipe with the settings applied, including `data.label_words`.

        Raises:
          ValueError: The number of words differs from that of labels, or two words are the same.
        """
        words = settings.label_words
        labels = self.labels
        if words:
            if len(words) != len(labels) or len({word.lower() for word in words}) != len(words):
                raise ValueError(
                    f"data.label_words is {words}; recipe {self.name!r} has {len(labels)} labels"
                    f" and needs as many different words, such as {self.words}"
                )
            labels = tuple(
                Label(word=word, names=(*label.names, label.word.lower()))
                for label, word in zip(labels, words, strict=True)
            )
        plain = dataclasses.replace(settings, label_words=())
        return dataclasses.replace(super().configured(plain), labels=labels)  # type: ignore[call-arg]

    @property
    def words(self) -> tuple[str, ...]:
        """Words of the labels, in order."""
        return tuple(label.word for label in self.labels)

    def example(self, row: Row) -> Example:
        """Returns an example whose answer is the label's word, and whose choices are all words.

        Raises:
          BadRowError: The row has no label, or an unknown one.
        """
        values = {field: self.read_text(row, field) for field in self.fields if field != "label"}
        index = self.label_index(self.read_value(row, "label"))
        choices = tuple(self.completion.format(**values, label=word) for word in self.words)
        return prompt_and_completion(
            self.prompt.format(**values),
            choices[index],
            answer=self.words[index],
            choices=choices,
            label=index,
            sentences=tuple(values.values()),
        )

    @property
    def num_labels(self) -> int:
        """Number of outputs of a classifier's head, one per label."""
        return len(self.labels)

    def answer_of(self, output: float) -> str:
        """Returns the word of the label with that number."""
        return self.words[int(output)]

    def label_index(self, value: Any) -> int:
        """Returns the number of a label given as a number, as digits or by name.

        Raises:
          BadRowError: There is no label, or it is unknown.
        """
        text = value.strip().lower() if isinstance(value, str) else value
        if text is None or text in _UNLABELED:
            raise BadRowError("no label", f"field 'label' is {value!r}")
        if isinstance(text, str):
            for index, label in enumerate(self.labels):
                if text in (label.word.lower(), *label.names):
                    return index
            text = int(text) if text.isdecimal() else text
        if isinstance(text, int) and not isinstance(text, bool) and 0 <= text < len(self.labels):
            return text
        names = [name for label in self.labels for name in (label.word, *label.names)]
        raise BadRowError(
            "unknown label",
            f"field 'label' is {value!r}{did_you_mean(str(value), names)};"
            f" or a number below {len(self.labels)}",
        )

    def predicted(self, prediction: str) -> int | None:
        """Returns the label whose word a generated answer begins with; None if there is none.

        Case, leading white space and the text after the word are ignored.
        """
        text = prediction.strip().lower()
        found = [
            index
            for index, word in enumerate(self.words)
            if re.match(rf"{re.escape(word.strip().lower())}(?!\w)", text)
        ]
        # "not" and "not sure" may both be words, so the longest match counts.
        return max(found, key=lambda index: len(self.words[index]), default=None)

    def score(self, prediction: str, example: Example) -> float:
        """Returns 1 if the prediction begins with the correct label's word, else 0."""
        return float(self.predicted(prediction) == example.label)

    def metrics(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Returns accuracy and the task's other metrics.

        A prediction without a label's word counts as wrong; in metrics of two labels, it counts as
        the other label.
        """
        found = super().metrics(predictions, examples)
        if not self.measures or not examples:
            return found
        right = np.array([example.label for example in examples], np.int64)
        said = np.array(
            [
                1 - truth if (label := self.predicted(prediction)) is None else label
                for prediction, truth in zip(predictions, right.tolist(), strict=True)
            ],
            np.int64,
        )
        known = {"f1": f1, "matthews_correlation": matthews_correlation}
        return found | {name: known[name](said, right) for name in self.measures}
