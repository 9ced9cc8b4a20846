"""A user's files in the columns of the hub's sets, so that one prompt does for both."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from peft_jax.data import BadRowError, DataSettings, Recipe, get_recipe
from peft_jax.data.bad_rows import as_bad_row
from peft_jax.data.recipes.classification import Classification
from peft_jax.data.sources import open_sources
from peft_jax.data.tables import Table

from .names import flores_languages, is_flores

_FOLDERS = {
    "mnli_mismatch": ("mnli", "multinli"),
    "mnli": ("mnli", "multinli"),
    "stsb": ("stsb", "stsbenchmark"),
    "flores": ("flores200", "flores", "floresplus", "flores101"),
    "humaneval": ("humaneval", "openaihumaneval"),
    "mt_bench": ("mtbench",),
}
"""What a task's folder may be called, without case and signs; others go by their own names."""

_SUBSETS = {"gsm8k": "main"}
"""The hub keeps these sets in a folder a subset; which one is meant."""


class MissingDataError(ValueError):
    """A folder of local data does not have a task's."""


def local_folder(data: Path, task: str) -> Path:
    """Where a task's files are below a folder of local data.

    Folders of the folder, and theirs, are looked at by name, without regard to case and signs:
    `glue/SST-2`, `sst2`.

    Raises:
      MissingDataError: there is none.
    """
    family = "flores" if is_flores(task) else "xnli" if task.startswith("xnli_") else task
    names = _FOLDERS.get(family, (_plain(family),))
    for folder in _folders(data):
        if _plain(folder.name) in names:
            return folder
    raise MissingDataError(f"{data} has no folder {' or '.join(names)}, which {task} would be in")


def recipe_for(task: str, path: str = "") -> tuple[Recipe, DataSettings]:
    """The training recipe of a task's data, and settings that fit it.

    Args:
      task: a task whose data can be local, or are opened by a recipe.
      path: the folder of its files; empty: the recipe's own set on the hub.
    """
    settings: dict[str, Any] = {"recipe": task, "path": path}
    if is_flores(task):
        source, target = flores_languages(task)
        settings |= {"recipe": "flores", "source_language": source, "target_language": target}
    elif task.startswith("xnli_"):
        settings |= {"recipe": "xnli", "language": task.removeprefix("xnli_")}
    elif task == "mnli_mismatch":
        settings |= {"recipe": "mnli"}
    made = DataSettings(**settings)
    return get_recipe(made.recipe).configured(made), made


def open_local(task: str, data: Path, *, examples: bool) -> dict[str, datasets.Dataset]:
    """A task's splits from a folder of local data, with the hub's columns and label numbers.

    Args:
      task: one of the project's tasks of the harness.
      data: the folder of local data.
      examples: whether the training rows are wanted, to take examples from. Otherwise one of them
        is read, which the harness asks for in any case.

    Raises:
      MissingDataError: it has no files of the task.
      ValueError: a row cannot be used; the file and line are named.
    """
    folder = local_folder(data, task)
    if is_flores(task):
        return open_by_recipe(task, str(folder), examples=examples)
    if task in _SUBSETS and (folder / _SUBSETS[task]).is_dir():
        folder = folder / _SUBSETS[task]
    if task.startswith("xnli_") and (folder / task.removeprefix("xnli_")).is_dir():
        folder = folder / task.removeprefix("xnli_")
    recipe, settings = recipe_for(task, str(folder))
    openers = recipe.find_splits(folder, settings)
    if not openers:
        raise MissingDataError(f"{folder} has no files for {task}")
    return {
        split: as_dataset(recipe, open_split(), most=_rows_of(split, examples))
        for split, open_split in openers.items()
    }


def open_by_recipe(task: str, path: str = "", *, examples: bool) -> dict[str, datasets.Dataset]:
    """The data of a task that the harness does not have, from a folder or from the hub.

    Args:
      task: its name.
      path: the folder of its files; empty: the hub's set.
      examples: as for `open_local`.

    Returns:
      "train", to take examples from, and "validation", to evaluate on.

    Raises:
      MissingDataError: the folder has no files of the task.
      ValueError: there are no held-out rows, or one cannot be used.
      FileNotFoundError: the hub's set cannot be had.
    """
    recipe, settings = recipe_for(task, path)
    try:
        sources = open_sources(settings, recipe)
    except (ValueError, FileNotFoundError) as error:
        if path:
            raise MissingDataError(f"{path} has no files for {task}: {error}") from error
        raise
    if sources.held_out is None:
        raise ValueError(f"{sources.train.name} has no rows held out to evaluate {task} on")
    return {
        "train": as_dataset(recipe, sources.train, most=_rows_of("train", examples)),
        "validation": as_dataset(recipe, sources.held_out),
    }


def as_dataset(recipe: Recipe, table: Table, *, most: int | None = None) -> datasets.Dataset:
    """Rows by the recipe's fields, which are the hub's columns; those without a label are left out.

    Args:
      recipe: how rows are read.
      table: the rows.
      most: read no more than so many; None: all.

    Raises:
      ValueError: a row cannot be used; the file and line are named.
    """
    read = _reader(recipe)

    def rows() -> Iterator[Mapping[str, Any]]:
        for index in range(len(table) if most is None else min(most, len(table))):
            try:
                with as_bad_row():
                    found = {**read(table[index]), "idx": index}
                yield found
            except BadRowError as error:
                # Published test splits have no labels, and are not evaluated on.
                if error.reason == "no label":
                    continue
                raise ValueError(f"{table.where(index)}: {error}") from error

    return datasets.Dataset.from_list(list(rows()))


def _rows_of(split: str, examples: bool) -> int | None:
    """How many rows of a split are read."""
    return 1 if split == "train" and not examples else None


def _reader(recipe: Recipe) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What makes a row with the hub's columns of a row of a file."""

    def read(row: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {
            field: recipe.read_text(row, field) for field in recipe.fields if field != "label"
        }
        if isinstance(recipe, Classification):
            values["label"] = recipe.label_index(recipe.read_value(row, "label"))
        elif "label" in recipe.fields:
            recipe.example(row)
            values["label"] = float(recipe.read_value(row, "label"))
        return values

    return read


def _folders(data: Path) -> Iterator[Path]:
    """The folder itself, its folders, and theirs."""
    yield data
    inner = sorted(path for path in data.iterdir() if path.is_dir())
    yield from inner
    for folder in inner:
        yield from sorted(path for path in folder.iterdir() if path.is_dir())


def _plain(name: str) -> str:
    """A name without case and signs.

    Example:
      >>> _plain("SST-2")
      'sst2'
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())
