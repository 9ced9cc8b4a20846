"""Classification as text: a prompt, and a word for each label."""

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
from peft_jax.data.settings import DataSettings
from peft_jax.data.tables import Row

_UNLABELED = (-1, "-1", "-", "")
"""What published sets put where there is no label: test splits, and where annotators disagree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """One label.

    Attributes:
      word: what the model says for it.
      names: what data call it besides its number, in lower case.
    """

    word: str
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Recipe):
    """A row has one of a few labels, and the answer is the label's word.

    Attributes:
      labels: the labels in the order of the numbers that stand for them in the data.
      measures: the task's measures besides accuracy: "f1" (of label 1) and "matthews_correlation".
    """

    labels: tuple[Label, ...]
    completion: str = " {label}"
    measures: tuple[str, ...] = ()
    metric: str = "accuracy"

    def configured(self, settings: DataSettings) -> "Recipe":
        """The recipe with what the settings replace, its labels' words included.

        Raises:
          ValueError: if there are not as many words as labels, or two are the same.
        """
        words = settings.label_words
        labels = self.labels
        if words:
            if len(words) != len(labels) or len({word.lower() for word in words}) != len(words):
                raise ValueError(
                    f"data.label_words is {words}; recipe {self.name!r} has {len(labels)} labels,"
                    f" which want as many different words; its own are {self.words}"
                )
            labels = tuple(
                Label(word=word, names=(*label.names, label.word.lower()))
                for label, word in zip(labels, words, strict=True)
            )
        plain = dataclasses.replace(settings, label_words=())
        return dataclasses.replace(super().configured(plain), labels=labels)  # type: ignore[call-arg]

    @property
    def words(self) -> tuple[str, ...]:
        """The labels' words, in the labels' order."""
        return tuple(label.word for label in self.labels)

    def example(self, row: Row) -> Example:
        """The label's word is learned; every label's is a choice.

        Raises:
          BadRowError: if the row has no label, or one that is not known.
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
        """One output of a classifier's head a label."""
        return len(self.labels)

    def answer_of(self, output: float) -> str:
        """The word of the label with that number."""
        return self.words[int(output)]

    def label_index(self, value: Any) -> int:
        """The number of a label as data write it: a number, its digits, or a name.

        Raises:
          BadRowError: if there is no label, or one that is not known.
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
        """The label whose word a generated answer begins with; None if it is no label's.

        Case, leading white space and what follows the word do not matter.
        """
        text = prediction.strip().lower()
        found = [
            index
            for index, word in enumerate(self.words)
            if re.match(rf"{re.escape(word.strip().lower())}(?!\w)", text)
        ]
        # "not" and "not sure" may both be words: the longer one is meant.
        return max(found, key=lambda index: len(self.words[index]), default=None)

    def score(self, prediction: str, example: Example) -> float:
        """1 if the prediction begins with the right label's word, else 0."""
        return float(self.predicted(prediction) == example.label)

    def metrics(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Accuracy and the task's own measures.

        A prediction that is no label's word counts as wrong: in measures of two labels, as the
        other one.
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
