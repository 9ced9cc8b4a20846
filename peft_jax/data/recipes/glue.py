"""Recipes for GLUE's tasks, for the hub's data set and the official TSV files.

Source: Wang et al., 2019, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding". Words of the labels, in the order of their numbers:

| recipe | words |
| --- | --- |
| cola | no, yes |
| sst2 | negative, positive |
| mrpc, qqp | no, yes |
| stsb | a number from 0.0 to 5.0 |
| mnli | yes, maybe, no |
| qnli, rte | yes, no |
| wnli | no, yes |
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Example, prompt_and_completion
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.recipes.classification import Classification, Label
from peft_jax.data.recipes.measures import pearson, spearman
from peft_jax.data.rows import Row

ENTAILMENT = (
    Label(word="yes", names=("entailment",)),
    Label(word="maybe", names=("neutral",)),
    Label(word="no", names=("contradiction",)),
)
"""Labels of "does the premise imply the hypothesis", in the order of MultiNLI and XNLI."""

_HIGHEST_SIMILARITY = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similarity(Recipe):
    """Rates the similarity of two sentences as a number from 0 to 5 with one decimal."""

    completion: str = " {label}"
    metric: str = "closeness"

    def example(self, row: Row) -> Example:
        """Returns an example whose answer is the number.

        Raises:
          BadRowError: The row has no number, or one out of range.
        """
        values = {field: self.read_text(row, field) for field in self.fields if field != "label"}
        raw = self.read_value(row, "label")
        try:
            number = float(raw)
        except (TypeError, ValueError):
            raise BadRowError("wrong type", f"field 'label' is {raw!r}, not a number") from None
        if number == -1:
            raise BadRowError("no label", f"field 'label' is {raw!r}")
        if not 0 <= number <= _HIGHEST_SIMILARITY:
            raise BadRowError("unknown label", f"field 'label' is {raw!r}; it must be from 0 to 5")
        answer = f"{number:.1f}"
        return prompt_and_completion(
            self.prompt.format(**values),
            self.completion.format(**values, label=answer),
            answer=answer,
            value=number,
            sentences=tuple(values.values()),
        )

    @property
    def num_labels(self) -> int:
        """Number of outputs of a classifier's head: one, the number."""
        return 1

    def answer_of(self, output: float) -> str:
        """Returns the number, clipped to the scale."""
        return f"{min(max(output, 0.0), _HIGHEST_SIMILARITY):.6f}"

    def score(self, prediction: str, example: Example) -> float:
        """Returns 1 minus the distance to the reference, relative to the scale."""
        distance = abs(_first_number(prediction) - float(example.answer))
        return max(0.0, 1 - distance / _HIGHEST_SIMILARITY)

    def metrics(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Returns closeness, Pearson's and Spearman's correlation; no number counts as 0."""
        if not examples:
            return {}
        said = np.array([_first_number(prediction) for prediction in predictions])
        # The reference is the exact number, since the answers are rounded.
        right = np.array(
            [e.value if e.value is not None else float(e.answer) for e in examples], np.float64
        )
        return {
            **super().metrics(predictions, examples),
            "pearson": pearson(said, right),
            "spearman": spearman(said, right),
        }


def _first_number(text: str) -> float:
    found = re.search(r"\d+(?:\.\d+)?", text)
    return float(found.group()) if found else 0.0


def _home(task: str) -> HubHome:
    return HubHome(path="nyu-mll/glue", subset=task)


_PAIR = {"sentence1": ("sentence1",), "sentence2": ("sentence2",)}

COLA = Classification(
    name="cola",
    about="is a sentence grammatical",
    fields={"sentence": ("sentence",), "label": ("label",)},
    headerless=(("source", "label", "mark", "sentence"),),
    prompt="Sentence: {sentence}\nIs the sentence grammatical?",
    labels=(Label(word="no", names=("unacceptable",)), Label(word="yes", names=("acceptable",))),
    hub=_home("cola"),
    eval_splits=("validation",),
    measures=("matthews_correlation",),
)
SST2 = Classification(
    name="sst2",
    about="is a film review's sentence negative or positive",
    fields={"sentence": ("sentence",), "label": ("label",)},
    prompt="Review: {sentence}\nSentiment:",
    labels=(Label(word="negative"), Label(word="positive")),
    hub=_home("sst2"),
    eval_splits=("validation",),
)
MRPC = Classification(
    name="mrpc",
    about="do two sentences say the same",
    fields={
        "sentence1": ("sentence1", "#1 String"),
        "sentence2": ("sentence2", "#2 String"),
        "label": ("label", "Quality"),
    },
    prompt="Sentence 1: {sentence1}\nSentence 2: {sentence2}\nDo they say the same?",
    labels=(
        Label(word="no", names=("not_equivalent",)),
        Label(word="yes", names=("equivalent",)),
    ),
    hub=_home("mrpc"),
    eval_splits=("validation",),
    measures=("f1",),
)
QQP = Classification(
    name="qqp",
    about="do two questions ask the same",
    fields={
        "question1": ("question1",),
        "question2": ("question2",),
        "label": ("label", "is_duplicate"),
    },
    prompt="Question 1: {question1}\nQuestion 2: {question2}\nDo they ask the same?",
    labels=(Label(word="no", names=("not_duplicate",)), Label(word="yes", names=("duplicate",))),
    hub=_home("qqp"),
    eval_splits=("validation",),
    measures=("f1",),
)
STSB = Similarity(
    name="stsb",
    about="how similar two sentences are, from 0 to 5",
    fields={**_PAIR, "label": ("label", "score")},
    prompt="Sentence 1: {sentence1}\nSentence 2: {sentence2}\nSimilarity from 0 to 5:",
    hub=_home("stsb"),
    eval_splits=("validation",),
)
MNLI = Classification(
    name="mnli",
    about="does a premise imply a hypothesis",
    fields={
        "premise": ("premise", "sentence1"),
        "hypothesis": ("hypothesis", "sentence2"),
        "label": ("label", "gold_label"),
    },
    prompt="Premise: {premise}\nHypothesis: {hypothesis}\nDoes the first imply the second?",
    labels=ENTAILMENT,
    hub=_home("mnli"),
    eval_splits=("validation_matched", "validation", "validation_mismatched"),
)
QNLI = Classification(
    name="qnli",
    about="does a sentence answer a question",
    fields={"question": ("question",), "sentence": ("sentence",), "label": ("label",)},
    prompt="Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question?",
    labels=(Label(word="yes", names=("entailment",)), Label(word="no", names=("not_entailment",))),
    hub=_home("qnli"),
    eval_splits=("validation",),
)
RTE = Classification(
    name="rte",
    about="does one text imply another",
    fields={**_PAIR, "label": ("label",)},
    prompt="Premise: {sentence1}\nHypothesis: {sentence2}\nDoes the first imply the second?",
    labels=(Label(word="yes", names=("entailment",)), Label(word="no", names=("not_entailment",))),
    hub=_home("rte"),
    eval_splits=("validation",),
)
WNLI = Classification(
    name="wnli",
    about="does a sentence imply another with its pronoun replaced",
    fields={**_PAIR, "label": ("label",)},
    prompt="Premise: {sentence1}\nHypothesis: {sentence2}\nDoes the first imply the second?",
    labels=(Label(word="no", names=("not_entailment",)), Label(word="yes", names=("entailment",))),
    hub=_home("wnli"),
    eval_splits=("validation",),
)

GLUE: tuple[Recipe, ...] = (COLA, SST2, MRPC, QQP, STSB, MNLI, QNLI, RTE, WNLI)
