"""Opens the rows of a run from local files and folders or the Hugging Face hub."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from peft_jax.core import did_you_mean
from peft_jax.data.data_files import is_data_file, missing_file_message, split_of
from peft_jax.data.recipes.base import HubHome, Recipe
from peft_jax.data.settings import DataSettings
from peft_jax.data.tables import AlignedTable, ArrowTable, LanguagesTable, SelectedTable, Table
from peft_jax.data.totals import Origin

_AUTOMATIC_SHARE = 0.05
_AUTOMATIC_MOST = 512
_MOST_NAMES = 3
"""Largest number of files named in messages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Rows of a run.

    Attributes:
      train: Training rows.
      held_out: Held-out rows; None if there are none.
      train_origin: Source of the training rows.
      held_out_origin: Source of the held-out rows.
    """

    train: Table
    held_out: Table | None
    train_origin: Origin
    held_out_origin: Origin


def open_sources(settings: DataSettings, recipe: Recipe, *, seed: int = 0) -> Sources:
    """Opens the training and held-out rows of a run.

    Args:
      settings: Data settings of the run.
      recipe: Recipe, configured by the settings; it knows columns, splits and the hub data set.
      seed: Seed of the run; used with `data.train_rows_by_seed`.

    Returns:
      Training and held-out rows, which never overlap.

    Raises:
      FileNotFoundError: A path does not exist; the message suggests near matches.
      ValueError: A split is missing, or there are no rows to train on.
    """
    first, of_first = recipe.languages(settings)[0]
    path = settings.path or _home(of_first, first).path
    splits = _open_languages(settings.path, settings, recipe)
    train_name = _choose_train(splits, settings, recipe)
    train = splits[train_name]()
    named = not _is_file(path)
    train_origin = Origin(
        name=_name(train),
        split=train_name if named else "",
        rows=len(train),
        chosen=bool(settings.train_split),
    )
    held_out, origin = None, Origin(name="")
    if settings.eval_path:
        held_out, eval_name = _open_eval(path, train_name, settings, recipe)
        named = not _is_file(settings.eval_path)
    elif not settings.hold_out:
        eval_name = _choose_eval(splits, train_name, settings, recipe)
        held_out = splits[eval_name]() if eval_name else None
    if held_out is None:
        train, held_out = _hold_out(train, settings)
        origin = train_origin
    else:
        origin = Origin(name=_name(held_out), split=eval_name if named else "", rows=len(held_out))
    before = len(train)
    train = _limit(train, settings.train_rows, _train_rows_seed(settings, seed))
    train_origin = dataclasses.replace(
        train_origin, held_out=train_origin.rows - before, set_aside=before - len(train)
    )
    if held_out is not None:
        before = len(held_out)
        held_out = _limit(held_out, settings.eval_rows, settings.hold_out_seed + 1)
        origin = dataclasses.replace(origin, chosen=True, set_aside=before - len(held_out))
    if not len(train):
        raise ValueError(f"{train.name}: there are no rows to train on")
    return Sources(
        train=train, held_out=held_out, train_origin=train_origin, held_out_origin=origin
    )


def _is_file(path: str) -> bool:
    return Path(path).expanduser().is_file()


def _name(table: Table) -> str:
    """Returns a table's name for messages: its distinct files relative to their common folder."""
    files = list(dict.fromkeys(table.files))
    # Files of a hub data set are in a cache, and its name says more.
    if len(files) < 2 or any(str(file) not in table.name for file in files):
        return table.name
    folder = Path(os.path.commonpath(files))
    shown = [str(file.relative_to(folder)) for file in files[:_MOST_NAMES]]
    more = len(files) - len(shown)
    return f"{', '.join(shown)}{f' and {more} more' if more else ''} in {folder}"


def _train_rows_seed(settings: DataSettings, seed: int) -> int:
    """Returns the seed that chooses the rows of `data.train_rows`."""
    if not settings.train_rows_by_seed:
        return settings.hold_out_seed + 1
    words = np.random.SeedSequence([settings.hold_out_seed + 1, seed]).generate_state(1)
    return int(words[0])


def _home(settings: DataSettings, recipe: Recipe) -> HubHome:
    home = recipe.hub_home(settings)
    if home is None:
        raise ValueError(
            f"data.path is empty, but recipe {recipe.name!r} has no data set of its own; set"
            " data.path"
        )
    return home


def _open_languages(
    path: str, settings: DataSettings, recipe: Recipe
) -> dict[str, Callable[[], Table]]:
    """Returns functions that open each split, in all languages of the settings.

    Args:
      path: Path or hub name; empty: the recipe's own data set on the hub.
      settings: Data settings of the run.
      recipe: Recipe, configured by the settings.
    """
    opened = []
    languages = recipe.languages(settings)
    for one, of_one in languages:
        home = HubHome(path=path, subset=settings.subset) if path else _home(of_one, one)
        subset = settings.subset or home.subset
        opened.append(_open_splits(home.path, subset, of_one, one))
    if len(opened) == 1:
        return opened[0]

    def join(split: str) -> Table:
        tables: list[Table] = []
        files: set[Path] = set()
        for (one, of_one), splits in zip(languages, opened, strict=True):
            if split not in splits:
                raise ValueError(
                    f"{_name_language(of_one)} has no split {split!r}, only"
                    f" {', '.join(sorted(splits))}; choose a split that all languages have"
                )
            table = splits[split]()
            joined = one.joinable(table)
            # Rows selected by a language column are different rows of the same file.
            whole = joined is table and not isinstance(table, SelectedTable)
            if whole and (both := files & {*table.files}):
                raise ValueError(
                    f"{sorted(both)[0]} does not name a language, so it would be read once per"
                    " language; give a folder with one file per language, or only one data.language"
                )
            files.update(table.files)
            tables.append(joined)
        return LanguagesTable(tables)

    return {
        split: functools.partial(join, split)
        for split in dict.fromkeys(split for splits in opened for split in splits)
    }


def _name_language(settings: DataSettings) -> str:
    if settings.recipe == "flores":
        return f"{settings.source_language} to {settings.target_language}"
    return f"data.language {settings.language!r}"


def _open_splits(
    path: str, subset: str, settings: DataSettings, recipe: Recipe
) -> dict[str, Callable[[], Table]]:
    """Returns functions that open each split of a path or a hub name."""
    local = Path(path).expanduser()
    if local.is_file():
        return {"train": functools.partial(recipe.open_file, local, settings)}
    if local.is_dir():
        return _open_folder(local, subset, settings, recipe)
    looks_local = path.startswith((".", "/", "~")) or is_data_file(local) or path.count("/") > 1
    if looks_local:
        raise FileNotFoundError(f"data.path is {path!r}: {missing_file_message(local)}")
    return _open_hub(path, subset, settings, recipe)


def _open_folder(
    folder: Path, subset: str, settings: DataSettings, recipe: Recipe
) -> dict[str, Callable[[], Table]]:
    if subset and (folder / subset).is_dir():
        folder = folder / subset
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = _load_saved(folder)
        return _named_splits(saved, str(folder))
    splits = recipe.find_splits(folder, settings)
    if not splits:
        names = sorted(entry.name for entry in folder.iterdir())[:10]
        raise FileNotFoundError(
            f"{folder} holds no data file for recipe {recipe.name!r}; it holds"
            f" {', '.join(names) or 'nothing'}"
        )
    return splits


def _load_saved(folder: Path) -> Any:
    """Loads a data set saved by `datasets`.

    Raises:
      ValueError: Its files are damaged or missing.
    """
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_from_disk(str(folder))
    # The library raises many types if the files are not as it wrote them.
    except (
        pyarrow.ArrowException,
        DatasetsError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        raise ValueError(
            f"{folder} cannot be read as a saved data set: {type(error).__name__}: {error}"
        ) from error


def _open_hub(
    path: str, subset: str, settings: DataSettings, recipe: Recipe
) -> dict[str, Callable[[], Table]]:
    import datasets

    load = functools.partial(datasets.load_dataset, path, revision=settings.revision or None)
    aligned = {} if subset else recipe.aligned_subsets(settings)
    sliced = [name for name in (settings.train_split, settings.eval_split) if "[" in name]
    try:
        if aligned:
            return _aligned_splits({key: load(name) for key, name in aligned.items()}, path)
        splits = _named_splits(load(subset or None), path)
        for name in sliced:
            rows = load(subset or None, split=name)
            splits[name] = functools.partial(ArrowTable, rows, f"{path} {name}")
    # The library raises many types if the data set or its subset is unavailable.
    except (OSError, ValueError, RuntimeError) as error:
        folder = Path(path).parent
        near = f" ({missing_file_message(Path(path))})" if folder.is_dir() else ""
        raise FileNotFoundError(
            f"data.path is {path!r}: there is no such file or folder{near}, and the data set of"
            f" that name could not be loaded from the Hugging Face hub: {error}"
        ) from error
    return splits


def _aligned_splits(sets: Mapping[str, Any], path: str) -> dict[str, Callable[[], Table]]:
    first = next(iter(sets.values()))

    def open_split(split: str) -> Table:
        return AlignedTable(
            {key: ArrowTable(rows[split], f"{path} {key} {split}") for key, rows in sets.items()}
        )

    return {split: functools.partial(open_split, split) for split in first}


def _named_splits(dataset: Any, name: str) -> dict[str, Callable[[], Table]]:
    if not isinstance(dataset, Mapping):
        dataset = {"train": dataset}
    return {
        split: functools.partial(ArrowTable, rows, f"{name} {split}")
        for split, rows in dataset.items()
    }


def _choose_train(splits: Mapping[str, Any], settings: DataSettings, recipe: Recipe) -> str:
    if settings.train_split:
        return _find_split("data.train_split", settings.train_split, splits)
    for name in recipe.train_splits:
        if found := _same_split(name, splits):
            return found
    raise ValueError(
        f"there is no split {' or '.join(recipe.train_splits)} to train on, only"
        f" {', '.join(sorted(splits))}; choose one in data.train_split"
    )


def _choose_eval(
    splits: Mapping[str, Any], train_name: str, settings: DataSettings, recipe: Recipe
) -> str:
    """Returns the split to evaluate on; "" if there is none."""
    if settings.eval_split:
        name = _find_split("data.eval_split", settings.eval_split, splits)
        if name == train_name:
            raise ValueError(
                f"data.eval_split is {settings.eval_split!r}, the training split; hold out some of"
                " its rows with data.hold_out"
            )
        return name
    found = (_same_split(name, splits) for name in recipe.eval_splits)
    return next((name for name in found if name and name != train_name), "")


def _find_split(setting: str, name: str, splits: Mapping[str, Any]) -> str:
    found = _same_split(name, splits)
    if not found:
        raise ValueError(f"{setting} is {name!r}{did_you_mean(name, splits)}")
    return found


def _same_split(name: str, splits: Mapping[str, Any]) -> str:
    """Returns the split of that name or of a synonym ("dev"); "" if there is none."""
    if name in splits:
        return name
    wanted = split_of(name)
    return next((split for split in splits if wanted and split_of(split) == wanted), "")


def _open_eval(
    train_path: str, train_name: str, settings: DataSettings, recipe: Recipe
) -> tuple[Table, str]:
    """Returns the rows of `data.eval_path`, and their split."""
    splits = _open_languages(settings.eval_path, settings, recipe)
    if settings.eval_split:
        name = _find_split("data.eval_split", settings.eval_split, splits)
    else:
        order = (*recipe.eval_splits, *recipe.train_splits)
        found = (_same_split(name, splits) for name in order)
        name = next((name for name in found if name), next(iter(splits)))
    same = settings.eval_path == train_path
    if not same and Path(train_path).exists() and Path(settings.eval_path).exists():
        same = Path(settings.eval_path).samefile(train_path)
    if same and name == train_name:
        raise ValueError(
            f"data.eval_path is {settings.eval_path!r}, the training rows; hold out some of them"
            " with data.hold_out"
        )
    return splits[name](), name


def _hold_out(train: Table, settings: DataSettings) -> tuple[Table, Table | None]:
    """Takes held-out rows from the training rows.

    Each of several languages gives an equal share. Translations of each other have the same number
    of rows and give the same ones, so that no held-out row is trained on in another language.
    """
    if not isinstance(train, LanguagesTable):
        return _hold_out_of_one(train, settings, most=_AUTOMATIC_MOST)
    count = len(train.parts)
    asked = settings.hold_out
    if asked is not None and asked >= 1:
        settings = dataclasses.replace(settings, hold_out=max(round(asked / count), 1))
    most = max(_AUTOMATIC_MOST // count, 1)
    pairs = [_hold_out_of_one(part, settings, most=most) for part in train.parts]
    held_out = [held for _, held in pairs if held is not None]
    if not held_out:
        return train, None
    return LanguagesTable([rest for rest, _ in pairs]), LanguagesTable(held_out)


def _hold_out_of_one(
    train: Table, settings: DataSettings, *, most: int
) -> tuple[Table, Table | None]:
    size, asked = len(train), settings.hold_out
    if asked == 0 or size < 2:
        return train, None
    if asked is None:
        number = min(max(round(size * _AUTOMATIC_SHARE), 1), most)
    else:
        number = max(round(size * asked), 1) if asked < 1 else int(asked)
    if number >= size:
        raise ValueError(
            f"data.hold_out is {asked}, but must be below {size}, the number of rows in"
            f" {train.name}"
        )
    rows = _sample(size, number, settings.hold_out_seed)
    return SelectedTable(train, rows, without=True), SelectedTable(train, rows)


def _limit(table: Table, most: int | None, seed: int) -> Table:
    """Returns at most `most` rows, chosen at random."""
    if most is None or most >= len(table):
        return table
    return SelectedTable(table, _sample(len(table), most, seed))


def _sample(size: int, number: int, seed: int) -> np.ndarray:
    """Returns int64 [number] sorted distinct indices below `size`, without listing all indices."""
    shuffle = functools.partial(
        grain.experimental.index_shuffle, max_index=size - 1, seed=seed % 2**32, rounds=4
    )
    return np.sort(np.array([shuffle(index) for index in range(number)], np.int64))
