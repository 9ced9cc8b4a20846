"""Recipe for XNLI: does a premise imply a hypothesis, in fifteen languages.

The words of the prompt and of the labels are English for every language; `data.prompt_template` and
`data.label_words` replace them.

Source: Conneau et al., 2018, "XNLI: Evaluating Cross-lingual Sentence Representations", arXiv
1809.05053.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from peft_jax.core import did_you_mean
from peft_jax.data.bad_rows import BadRowError, as_bad_row
from peft_jax.data.data_files import is_data_file, words_of
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.recipes.classification import Classification
from peft_jax.data.recipes.glue import ENTAILMENT
from peft_jax.data.settings import DataSettings, split_names
from peft_jax.data.tables import SelectedTable, Table

LANGUAGES = (
    "ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh",
)  # fmt: skip

_ROWS_LOOKED_AT = 16
"""Number of rows examined for a column "language"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossLingualInference(Classification):
    """Natural language inference in the chosen languages.

    Rows come from each language's files in a folder, or from its subset on the hub. If rows have a
    column "language", as in the published files, those of the chosen language are used.
    """

    def languages(self, settings: DataSettings) -> tuple[tuple[Recipe, DataSettings], ...]:
        """Returns the settings of each language in `data.language`."""
        names = split_names(settings.language)
        return tuple((self, dataclasses.replace(settings, language=name)) for name in names)

    def find_splits(self, folder: Path, settings: DataSettings) -> dict[str, Callable[[], Table]]:
        """Returns functions that open each split of a local folder.

        Raises:
          ValueError: The folder has files in some of the languages, but not in this one.
        """
        wanted = _language(settings)
        there = {
            word
            for path in folder.rglob("*")
            if path.is_file() and is_data_file(path)
            for part in path.relative_to(folder).parts
            for word in words_of(part)
            if word in LANGUAGES
        }
        if there and wanted not in there:
            raise ValueError(
                f"data.language is {wanted!r}, but {folder} has no file of that language"
                f"{did_you_mean(wanted, there)}"
            )
        return {
            split: functools.partial(_open_in_language, open_split, wanted)
            for split, open_split in super().find_splits(folder, settings).items()
        }

    def open_file(self, path: Path, settings: DataSettings) -> Table:
        """Opens the rows of one local file in the chosen language.

        Raises:
          ValueError: The file has a column "language", but no row in this language.
        """
        open_all = functools.partial(super().open_file, path, settings)
        return _open_in_language(open_all, _language(settings))

    def hub_home(self, settings: DataSettings) -> HubHome:
        """Returns the hub's data set in the chosen language."""
        return HubHome(path="facebook/xnli", subset=_language(settings))

    def unwanted_words(self, settings: DataSettings) -> tuple[str, ...]:
        """Returns the other languages, whose files are ignored."""
        language = _language(settings)
        return tuple(other for other in LANGUAGES if other != language)


def _open_in_language(open_all: Callable[[], Table], language: str) -> Table:
    """Returns the rows of a language; all rows if they have no column "language"."""
    table = open_all()
    of_rows = [_language_of(table, index) for index in range(min(len(table), _ROWS_LOOKED_AT))]
    if not any(of_rows):
        return table
    of_rows = [_language_of(table, index) for index in range(len(table))]
    # Unreadable rows are kept, to be counted as bad rows.
    rows = [index for index, found in enumerate(of_rows) if found in ("", language)]
    if language not in of_rows:
        raise ValueError(
            f"data.language is {language!r}, but {table.name} has no row in it"
            f"{did_you_mean(language, set(filter(None, of_rows)))}"
        )
    return SelectedTable(table, np.array(rows, np.int64))


def _language_of(table: Table, index: int) -> str:
    """Returns the language of a row; "" if it has none or cannot be read."""
    try:
        with as_bad_row():
            return str(table[index].get("language") or "")
    except BadRowError:
        return ""


def _language(settings: DataSettings) -> str:
    if settings.language not in LANGUAGES:
        raise ValueError(
            f"data.language is {settings.language!r}{did_you_mean(settings.language, LANGUAGES)}"
        )
    return settings.language


XNLI = CrossLingualInference(
    name="xnli",
    about="does a premise imply a hypothesis, in any of fifteen languages",
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
