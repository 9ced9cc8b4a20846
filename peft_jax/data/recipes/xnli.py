"""XNLI: does a premise imply a hypothesis, in fifteen languages.

Conneau et al., 2018, "XNLI: Evaluating Cross-lingual Sentence Representations", arXiv 1809.05053.
The prompt's own words and the labels' stay English in every language; `data.prompt_template` and
`data.label_words` replace them.
"""

import dataclasses

from peft_jax.core import did_you_mean
from peft_jax.data.recipes.base import HubHome
from peft_jax.data.recipes.classification import Classification
from peft_jax.data.recipes.glue import ENTAILMENT
from peft_jax.data.settings import DataSettings

LANGUAGES = (
    "ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossLingualInference(Classification):
    """One language's files of a folder, or one language's subset of the hub's set."""

    def hub_home(self, settings: DataSettings) -> HubHome:
        """The hub's set in the wanted language."""
        return HubHome(path="facebook/xnli", subset=_language(settings))

    def unwanted_words(self, settings: DataSettings) -> tuple[str, ...]:
        """The other languages, whose files are passed over."""
        language = _language(settings)
        return tuple(other for other in LANGUAGES if other != language)


def _language(settings: DataSettings) -> str:
    if settings.language not in LANGUAGES:
        raise ValueError(
            f"data.language is {settings.language!r}{did_you_mean(settings.language, LANGUAGES)}"
        )
    return settings.language


XNLI = CrossLingualInference(
    name="xnli",
    about="does a premise imply a hypothesis, in one of fifteen languages",
    fields={
        "premise": ("premise", "sentence1"),
        "hypothesis": ("hypothesis", "sentence2"),
        "label": ("label", "gold_label"),
    },
    headerless=(("premise", "hypothesis", "label"),),
    prompt="Premise: {premise}\nHypothesis: {hypothesis}\nDoes the first imply the second?",
    labels=ENTAILMENT,
    train_splits=("train", "validation"),
)
