"""Recipe for translation: FLORES, and other aligned pairs of sentences.

Source: NLLB Team, 2022, "No Language Left Behind: Scaling Human-Centered Machine Translation",
arXiv 2207.04672.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.core import did_you_mean
from peft_jax.data.data_files import open_lines, split_of
from peft_jax.data.examples import Example
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.recipes.measures import chrf
from peft_jax.data.rows import Row
from peft_jax.data.settings import DataSettings, split_names
from peft_jax.data.tables import AlignedTable, Table

_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
"""Pattern of FLORES's codes: language and script."""

_LANGUAGES = "languages"
"""Column of joined rows with the codes of their two languages."""

LANGUAGE_NAMES = {
    "arb_Arab": "Arabic",
    "ben_Beng": "Bengali",
    "bul_Cyrl": "Bulgarian",
    "cat_Latn": "Catalan",
    "ces_Latn": "Czech",
    "cmn_Hans": "Chinese",
    "dan_Latn": "Danish",
    "deu_Latn": "German",
    "ell_Grek": "Greek",
    "eng_Latn": "English",
    "est_Latn": "Estonian",
    "fin_Latn": "Finnish",
    "fra_Latn": "French",
    "heb_Hebr": "Hebrew",
    "hin_Deva": "Hindi",
    "hun_Latn": "Hungarian",
    "ind_Latn": "Indonesian",
    "ita_Latn": "Italian",
    "jpn_Jpan": "Japanese",
    "kor_Hang": "Korean",
    "nld_Latn": "Dutch",
    "pes_Arab": "Persian",
    "pol_Latn": "Polish",
    "por_Latn": "Portuguese",
    "ron_Latn": "Romanian",
    "rus_Cyrl": "Russian",
    "spa_Latn": "Spanish",
    "swe_Latn": "Swedish",
    "swh_Latn": "Swahili",
    "tam_Taml": "Tamil",
    "tel_Telu": "Telugu",
    "tha_Thai": "Thai",
    "tur_Latn": "Turkish",
    "ukr_Cyrl": "Ukrainian",
    "urd_Arab": "Urdu",
    "vie_Latn": "Vietnamese",
    "zho_Hans": "Chinese",
}
"""English names of FLORES's languages, for the prompt; others are named by their code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translation(Recipe):
    """Translates a sentence from one language to another.

    A folder may hold aligned files with one sentence per line: "dev/eng_Latn.dev" or "train.en".
    Other files have a column per language, named by its code, by "sentence_" and its code, or
    "source" and "target"; or a column "translation" with both.

    Attributes:
      source_code: Code of the source language; empty: read from each row.
      target_code: Code of the target language; empty: read from each row.
    """

    source_code: str = ""
    target_code: str = ""

    def configured(self, settings: DataSettings) -> Recipe:
        """Returns the recipe for the languages in the settings.

        Raises:
          ValueError: Source and target are the same.
        """
        pairs = _pairs(settings)
        if not pairs:
            language = settings.source_language
            raise ValueError(
                f"data.source_language and data.target_language are both {language!r}, but must"
                " differ"
            )
        pair = self._between(*pairs[0]) if len(pairs) == 1 else self
        return super(Translation, pair).configured(settings)

    def languages(self, settings: DataSettings) -> tuple[tuple[Recipe, DataSettings], ...]:
        """Returns the recipe and the settings of each pair of languages."""
        if self.source_code:
            return ((self, settings),)
        return tuple(
            (
                self._between(source, target),
                dataclasses.replace(settings, source_language=source, target_language=target),
            )
            for source, target in _pairs(settings)
        )

    def joinable(self, table: Table) -> Table:
        """Adds the languages' codes to the rows of one pair of languages."""
        return _PairTable(table, self)

    def _between(self, source: str, target: str) -> "Translation":
        """Returns the recipe for one pair of languages, whose columns are named by their codes."""
        fields = {
            field: (f"sentence_{code}", code, *self.fields[field])
            for field, code in (("source", source), ("target", target))
        }
        return dataclasses.replace(self, fields=fields, source_code=source, target_code=target)

    def aligned_subsets(self, settings: DataSettings) -> dict[str, str]:
        """Returns the hub's subset of each language; all have their rows in the same order."""
        return {"source": self.source_code, "target": self.target_code}

    def find_splits(self, folder: Path, settings: DataSettings) -> dict[str, Callable[[], Table]]:
        """Returns functions that open each split: aligned files, or else those of other recipes.

        Raises:
          ValueError: The folder has files in some of FLORES's languages, but not in one of these.
        """
        sides = [_files_in_language(folder, code) for code in (self.source_code, self.target_code)]
        splits: dict[str, Callable[[], Table]] = {
            split: functools.partial(_open_pair, sides[0][split], sides[1][split])
            for split in sides[0]
            if split in sides[1]
        }
        if not splits:
            self._check_languages(folder)
        return splits or super().find_splits(folder, settings)

    def _check_languages(self, folder: Path) -> None:
        """Raises ValueError if files are named by FLORES's codes, but none by one of these."""
        there = {
            part
            for path in folder.rglob("*")
            for part in path.name.split(".")
            if _CODE.fullmatch(part)
        }
        for setting, code in (("source", self.source_code), ("target", self.target_code)):
            if there and code not in there:
                raise ValueError(
                    f"data.{setting}_language is {code!r}, but {folder} has no file of that"
                    f" language{did_you_mean(code, there)}"
                )

    def read_value(self, row: Row, field: str) -> Any:
        """Reads one field, from the column "translation" if the row has one."""
        both = row.get("translation")
        return super().read_value(both if isinstance(both, Mapping) else row, field)

    def read(self, row: Row) -> dict[str, str]:
        """Reads the two sentences, and adds the languages' names."""
        codes = (self.source_code, self.target_code) if self.source_code else row[_LANGUAGES]
        source, target = (LANGUAGE_NAMES.get(code, code) for code in codes)
        return {**super().read(row), "source_language": source, "target_language": target}

    def template_fields(self) -> tuple[str, ...]:
        """Returns the names of the sentences and the languages."""
        return (*self.fields, "source_language", "target_language")

    def score(self, prediction: str, example: Example) -> float:
        """Returns the character n-gram F-score of the prediction's first line, from 0 to 1."""
        return chrf([_first_line(prediction)], [example.answer])

    def metrics(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Returns the character n-gram F-score over all sentences, from 0 to 1."""
        if not examples:
            return {}
        answers = [example.answer for example in examples]
        return {self.metric: chrf([_first_line(text) for text in predictions], answers)}


def _pairs(settings: DataSettings) -> list[tuple[str, str]]:
    """Returns all pairs of a source and a different target language."""
    sources, targets = map(split_names, (settings.source_language, settings.target_language))
    return [pair for pair in itertools.product(sources, targets) if pair[0] != pair[1]]


class _PairTable:
    """Rows of one pair of languages as "source" and "target", with the languages' codes."""

    def __init__(self, table: Table, recipe: Translation):
        self.name = table.name
        self.files = table.files
        self._table = table
        self._recipe = recipe

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        row = self._table[index]
        values = {field: self._recipe.read_value(row, field) for field in self._recipe.fields}
        return {**values, _LANGUAGES: (self._recipe.source_code, self._recipe.target_code)}

    def where(self, index: int) -> str:
        return self._table.where(index)


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _files_in_language(folder: Path, code: str) -> dict[str, Path]:
    """Returns by split the files whose names begin or end with a language's code."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.name.split(".")
        if path.is_file() and len(parts) > 1 and code in (parts[0], parts[-1]):
            others = ".".join(part for part in parts if part != code)
            split = split_of(others) or split_of(path.parent.name)
            found.setdefault(split or "train", path)
    return found


def _open_pair(source: Path, target: Path) -> Table:
    return AlignedTable({"source": open_lines(source), "target": open_lines(target)})


FLORES = Translation(
    name="flores",
    about="translation of a sentence from one language to another",
    fields={"source": ("source",), "target": ("target",)},
    prompt="{source_language}: {source}\n{target_language}:",
    chat_prompt="Translate from {source_language} to {target_language}:\n{source}",
    completion=" {target}",
    hub=HubHome(path="openlanguagedata/flores_plus"),
    train_splits=("train", "validation"),
    eval_splits=("test", "validation"),
    metric="chrf",
)
