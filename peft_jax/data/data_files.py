"""Opens local data files: detects formats and splits, and reads rows."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.core import did_you_mean
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.record_parsers import csv_parser, parse_json, split_record
from peft_jax.data.record_table import (
    Bytes,
    Records,
    RecordTable,
    find_csv_records,
    find_json_items,
    find_lines,
    find_paragraphs,
    find_whole,
    first_letter,
)
from peft_jax.data.settings import DataSettings, TextUnit
from peft_jax.data.tables import ArrowTable, JoinedTable, MemoryTable, Table

TEXT_COLUMN = "text"
"""Column of a plain text file's rows."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "eval": "validation",
    "test": "test",
    "devtest": "test",
}
"""Canonical names of splits, by the words for them in file names."""

_QUALIFIERS = ("matched", "mismatched")
"""Words in file names that distinguish two splits of one kind (MultiNLI's)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Columns of a recipe's files.

    Attributes:
      known: Column names that the recipe reads; a first line with one of them is a header.
      headerless: Columns of layouts that are published without a header.
    """

    known: tuple[str, ...] = ()
    headerless: tuple[tuple[str, ...], ...] = ()


def is_data_file(path: Path) -> bool:
    """Returns whether a file name has the suffix of a data file."""
    return _format(path) in _READERS


def open_file(path: Path, settings: DataSettings, layout: Layout) -> Table:
    """Opens one data file in the format of its suffix.

    Args:
      path: File: jsonl, ndjson, json, csv, tsv, txt (each also with .gz), parquet or arrow.
      settings: Header, column names, quoting and text unit.
      layout: Columns of the recipe.

    Raises:
      ValueError: The format is unknown, or the file cannot be read.
    """
    kind = _format(path)
    if kind not in _READERS:
        raise ValueError(f"{path} has no known data format{did_you_mean(kind, _READERS)}")
    return _READERS[kind](path, settings, layout)


def open_lines(path: Path) -> Table:
    """Opens the lines of a text file, including blank ones, which keep files aligned."""
    return RecordTable(path, functools.partial(find_lines, keep_blank=True), _text_row)


def find_splits(folder: Path, unwanted: Sequence[str] = ()) -> dict[str, list[Path]]:
    """Finds the data files of a folder and groups them by split.

    A file's split is named in its own name ("train-00000-of-00002.parquet", "dev_matched.tsv"), or
    else in its folder's.

    Args:
      folder: Folder, searched with its subfolders.
      unwanted: Words; files with one of them in their paths are ignored.

    Returns:
      Files of each split, sorted by name. If no file names a split, all files are training rows.

    Raises:
      ValueError: A split has files of several formats, which may hold the same rows twice.
    """
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or not is_data_file(path):
            continue
        words = [word for part in path.relative_to(folder).parts for word in words_of(part)]
        if set(unwanted) & set(words):
            continue
        split = split_of(path.name) or (split_of(path.parent.name) if path.parent != folder else "")
        (splits.setdefault(split, []) if split else unnamed).append(path)
    if not splits and unnamed:
        splits = {"train": unnamed}
    for split, paths in splits.items():
        if len({_format(path) for path in paths}) > 1:
            names = ", ".join(path.name for path in paths)
            raise ValueError(
                f"{folder} has files of several formats for {split}: {names}; since they may hold"
                " the same rows, set data.path to one file"
            )
    return splits


def split_of(name: str) -> str:
    """Returns the canonical split in a file's or folder's name; "" if there is none.

    Example:
      >>> split_of("train-00000-of-00002.parquet"), split_of("dev_matched.tsv"), split_of("a.json")
      ('train', 'validation_matched', '')
    """
    words = words_of(name)
    kinds = [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES]
    if not kinds:
        return ""
    return "_".join([kinds[0], *(word for word in words if word in _QUALIFIERS)])


def missing_file_message(path: Path) -> str:
    """Returns a message for a missing path, with near matches in its folder."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    name = path.relative_to(folder).parts[0]
    return f"there is no {name!r} in {folder}{did_you_mean(name, names[:50])}"


def words_of(name: str) -> list[str]:
    """Splits a file's or folder's name into words in lower case.

    Example:
      >>> words_of("XNLI.train-sw.tsv")
      ['xnli', 'train', 'sw', 'tsv']
    """
    return [word for word in re.split(r"[-_.]", name.lower()) if word]


def _format(path: Path) -> str:
    """Returns the suffix of the format, without ".gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        ending = suffixes[-1] if suffixes else ""
        return "" if ending in (".parquet", ".arrow") else ending
    return suffixes[-1] if suffixes else ""


def _read_jsonl(path: Path, settings: DataSettings, layout: Layout) -> Table:
    return RecordTable(path, find_lines, parse_json)


def _read_json(path: Path, settings: DataSettings, layout: Layout) -> Table:
    """Reads a JSON array of objects or, as in many files of this suffix, one object per line."""

    def find(data: Bytes) -> Records:
        letter = first_letter(data)
        if letter == "[":
            return find_json_items(data, str(path))
        if letter in ("", "{"):
            return find_lines(data)
        raise ValueError(
            f"{path}: broken JSON: it begins with {letter!r}, but must hold an array of objects, or"
            " one object per line"
        )

    return RecordTable(path, find, parse_json)


def _read_delimited(
    path: Path, settings: DataSettings, layout: Layout, *, delimiter: str, quoted: bool
) -> Table:
    quoting = quoted if settings.quoting is None else settings.quoting
    find_quoted = functools.partial(find_csv_records, delimiter=delimiter)
    find: Callable[[Bytes], Records] = find_quoted if quoting else find_lines
    records = RecordTable(path, find, _text_row)
    if not len(records):
        return MemoryTable([], str(path), files=(path,))
    try:
        first = split_record(records[0][TEXT_COLUMN], delimiter, quoting=quoting)
    except BadRowError as error:
        raise ValueError(f"{records.where(0)}: the first line cannot be read: {error}") from error
    columns, has_header = _columns(path, first, settings, layout)
    parse = csv_parser(columns, delimiter, quoting=quoting)
    return records.parsed_by(parse, skip=1 if has_header else 0)


def _columns(
    path: Path, first: list[str], settings: DataSettings, layout: Layout
) -> tuple[list[str], bool]:
    """Returns the column names of a csv or tsv file, and whether its first record holds them."""
    has_header = settings.header
    if has_header is None:
        known = {name.lower() for name in (*layout.known, *settings.columns.values())}
        named = not settings.column_names and any(cell.strip().lower() in known for cell in first)
        fits = settings.column_names or _headerless(first, layout)
        # An unknown layout is treated as having a header, so that errors about missing columns
        # show the names in the file.
        has_header = named or not fits
    if settings.column_names:
        return list(settings.column_names), bool(settings.header)
    if has_header:
        return [cell.strip() for cell in first], True
    columns = _headerless(first, layout)
    if columns is None:
        raise ValueError(f"{path} has no header and {len(first)} columns; set data.column_names")
    return list(columns), False


def _headerless(first: list[str], layout: Layout) -> tuple[str, ...] | None:
    return next((names for names in layout.headerless if len(names) == len(first)), None)


def _read_text(path: Path, settings: DataSettings, layout: Layout) -> Table:
    finders: Mapping[TextUnit, Callable] = {
        "line": find_lines,
        "paragraph": find_paragraphs,
        "file": find_whole,
    }
    return RecordTable(path, finders[settings.text_unit], _text_row)


def _read_parquet(path: Path, settings: DataSettings, layout: Layout) -> Table:
    import datasets

    return _open_arrow(datasets.Dataset.from_parquet, path)


def _read_arrow(path: Path, settings: DataSettings, layout: Layout) -> Table:
    import datasets

    return _open_arrow(datasets.Dataset.from_file, path)


def _open_arrow(load: Callable[[str], Any], path: Path) -> Table:
    """Opens a file with a loader of `datasets`.

    Raises:
      ValueError: The file is damaged, or has another format.
    """
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        return ArrowTable(load(str(path)), str(path), files=(path,))
    # An unreadable footer or schema raises Arrow's error, which may be a plain OSError; unreadable
    # rows raise an error of datasets.
    except (pyarrow.ArrowException, DatasetsError, OSError) as error:
        raise ValueError(f"{path} cannot be read as {_format(path)[1:]}: {error}") from error


def _text_row(text: str) -> dict[str, str]:
    return {TEXT_COLUMN: text}


_READERS: dict[str, Callable[[Path, DataSettings, Layout], Table]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": functools.partial(_read_delimited, delimiter=",", quoted=True),
    ".tsv": functools.partial(_read_delimited, delimiter="\t", quoted=False),
    ".txt": _read_text,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def open_files(paths: Sequence[Path], settings: DataSettings, layout: Layout) -> Table:
    """Opens several files as one table."""
    tables = [open_file(path, settings, layout) for path in paths]
    return tables[0] if len(tables) == 1 else JoinedTable(tables)
