"""Reads local files into the columns of the hub's data sets, so that both share one prompt."""

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
"""Folder names of a task, without case and punctuation; other tasks use their own names."""

_SUBSETS = {"gsm8k": "main"}
"""Subset to use of a data set whose subsets the hub keeps in folders."""


class MissingDataError(ValueError):
    """Raised when a folder of local data has no data for a task."""


def local_folder(data: Path, task: str) -> Path:
    """Finds the folder of a task within a folder of local data.

    Names are compared without case and punctuation, down to two levels: `glue/SST-2`, `sst2`.

    Raises:
      MissingDataError: There is no such folder.
    """
    family = "flores" if is_flores(task) else "xnli" if task.startswith("xnli_") else task
    names = _FOLDERS.get(family, (_plain(family),))
    for folder in _folders(data):
        if _plain(folder.name) in names:
            return folder
    raise MissingDataError(f"{data} has no folder {' or '.join(names)} with data for {task}")


def recipe_for(task: str, path: str = "") -> tuple[Recipe, DataSettings]:
    """Returns the training recipe of a task, and its data settings.

    Args:
      task: Task with local data, or data that a recipe opens.
      path: Folder of its files; empty: the recipe's data set on the hub.
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
    """Reads a task's splits from local files, with the hub's columns and label indices.

    Args:
      task: One of this project's tasks of the harness.
      data: Folder of local data.
      examples: Whether to read all training rows, for few-shot examples. Otherwise only one is
        read, which the harness always needs.

    Raises:
      MissingDataError: The folder has no files for the task.
      ValueError: A row is invalid; the message names the file and line.
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
        split: as_dataset(recipe, open_split(), max_rows=_rows_of(split, examples))
        for split, open_split in openers.items()
    }


def open_by_recipe(task: str, path: str = "", *, examples: bool) -> dict[str, datasets.Dataset]:
    """Reads the data of a task that the harness does not have, from a folder or the hub.

    Args:
      task: Name of the task.
      path: Folder of its files; empty: the data set on the hub.
      examples: Whether to read all training rows, as in `open_local`.

    Returns:
      The splits "train", for few-shot examples, and "validation", to evaluate on.

    Raises:
      MissingDataError: The folder has no files for the task.
      ValueError: There are no held-out rows, or a row is invalid.
      FileNotFoundError: The data set cannot be loaded from the hub.
    """
    recipe, settings = recipe_for(task, path)
    try:
        sources = open_sources(settings, recipe)
    except (ValueError, FileNotFoundError) as error:
        if path:
            raise MissingDataError(f"{path} has no files for {task}: {error}") from error
        raise
    if sources.held_out is None:
        raise ValueError(
            f"{sources.train.name} has no held-out rows to evaluate {task} on; give data with a"
            " validation split"
        )
    return {
        "train": as_dataset(recipe, sources.train, max_rows=_rows_of("train", examples)),
        "validation": as_dataset(recipe, sources.held_out),
    }


def as_dataset(recipe: Recipe, table: Table, *, max_rows: int | None = None) -> datasets.Dataset:
    """Reads rows into the recipe's fields, which are the hub's columns; skips unlabeled rows.

    Args:
      recipe: Recipe that reads the rows.
      table: Rows.
      max_rows: Maximum number of rows to read; None: all.

    Raises:
      ValueError: A row is invalid; the message names the file and line.
    """
    read = _reader(recipe)

    def rows() -> Iterator[Mapping[str, Any]]:
        for index in range(len(table) if max_rows is None else min(max_rows, len(table))):
            try:
                with as_bad_row():
                    found = {**read(table[index]), "idx": index}
                yield found
            except BadRowError as error:
                # Published test splits have no labels and cannot be evaluated.
                if error.reason == "no label":
                    continue
                raise ValueError(f"{table.where(index)}: {error}") from error

    return datasets.Dataset.from_list(list(rows()))


def _rows_of(split: str, examples: bool) -> int | None:
    """Returns the maximum number of rows to read of a split; None: all."""
    return 1 if split == "train" and not examples else None


def _reader(recipe: Recipe) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns a function that converts a row of a file to the hub's columns."""

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
    """Yields the folder, its subfolders, and their subfolders."""
    yield data
    inner = sorted(path for path in data.iterdir() if path.is_dir())
    yield from inner
    for folder in inner:
        yield from sorted(path for path in folder.iterdir() if path.is_dir())


def _plain(name: str) -> str:
    """Returns a name in lower case and without punctuation.

    Example:
      >>> _plain("SST-2")
      'sst2'
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())
