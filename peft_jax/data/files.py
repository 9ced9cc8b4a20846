"""Local data files: which format a file has, which split it is, and its rows."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.core import did_you_mean
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.settings import DataSettings, TextUnit
from peft_jax.data.tables import (
    ArrowTable,
    Bytes,
    JoinedTable,
    MemoryTable,
    Records,
    RecordTable,
    Table,
    csv_parser,
    find_csv_records,
    find_json_items,
    find_lines,
    find_paragraphs,
    find_whole,
    first_letter,
    parse_json,
    split_record,
)

TEXT_COLUMN = "text"
"""The column of a plain text file's rows."""

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
"""What a split is called in files' names, and what it is called here."""

_QUALIFIERS = ("matched", "mismatched")
"""What tells two splits of one kind apart in a file's name (MultiNLI's)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What a recipe knows of the columns of its files.

    Attributes:
      known: every column name the recipe would take; a first line with one of them is a header.
      headerless: the columns of the layouts that are published without a header.
    """

    known: tuple[str, ...] = ()
    headerless: tuple[tuple[str, ...], ...] = ()


def is_data_file(path: Path) -> bool:
    """Whether a name ends as a data file's does."""
    return _format(path) in _READERS


def open_file(path: Path, settings: DataSettings, layout: Layout) -> Table:
    """The rows of one data file, by the ending of its name.

    Args:
      path: jsonl, ndjson, json, csv, tsv, txt (each of them also with .gz), parquet or arrow.
      settings: header, column names, quoting and text unit.
      layout: the columns that are looked for.

    Raises:
      ValueError: if the format is not known, or the file as a whole cannot be read.
    """
    kind = _format(path)
    if kind not in _READERS:
        raise ValueError(f"{path}: not a known data format{did_you_mean(kind, _READERS)}")
    return _READERS[kind](path, settings, layout)


def open_lines(path: Path) -> Table:
    """The lines of a text file, blank ones too, so that files stay aligned."""
    return RecordTable(path, functools.partial(find_lines, keep_blank=True), _text_row)


def find_splits(folder: Path, unwanted: Sequence[str] = ()) -> dict[str, list[Path]]:
    """The data files of a folder by split, as their names tell.

    A file's split is the word for one in its own name ("train-00000-of-00002.parquet",
    "dev_matched.tsv"), or else in its folder's.

    Args:
      folder: the folder; its subfolders are looked into as well.
      unwanted: files with one of these words in their paths are passed over.

    Returns:
      The files of each split, in the order of their names. Files that name no split are the
      training rows where no file names any.

    Raises:
      ValueError: if a split has files of several formats, which may be the same rows twice.
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
                f"{folder} has files of several formats for {split}: {names}. They may hold the"
                " same rows; name the file to use in data.path"
            )
    return splits


def split_of(name: str) -> str:
    """The split that a file's or folder's name tells, as it is called here; "" if none.

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
    """Why there is nothing at a path, with the near matches in its folder."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    name = path.relative_to(folder).parts[0]
    return f"there is no {name!r} in {folder}{did_you_mean(name, names[:50])}"


def words_of(name: str) -> list[str]:
    """The words of a file's or folder's name, in lower case.

    Example:
      >>> words_of("XNLI.train-sw.tsv")
      ['xnli', 'train', 'sw', 'tsv']
    """
    return [word for word in re.split(r"[-_.]", name.lower()) if word]


def _format(path: Path) -> str:
    """The ending that tells the format, without ".gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        ending = suffixes[-1] if suffixes else ""
        return "" if ending in (".parquet", ".arrow") else ending
    return suffixes[-1] if suffixes else ""


def _read_jsonl(path: Path, settings: DataSettings, layout: Layout) -> Table:
    return RecordTable(path, find_lines, parse_json)


def _read_json(path: Path, settings: DataSettings, layout: Layout) -> Table:
    """A JSON array of objects; or, as many files are, one object a line in spite of the name."""

    def find(data: Bytes) -> Records:
        letter = first_letter(data)
        if letter == "[":
            return find_json_items(data, str(path))
        if letter in ("", "{"):
            return find_lines(data)
        raise ValueError(
            f"{path}: broken JSON: it begins with {letter!r}; it should hold an array of objects,"
            " or one object a line"
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
    """The names of a csv or tsv file's columns, and whether its first record holds them."""
    has_header = settings.header
    if has_header is None:
        known = {name.lower() for name in (*layout.known, *settings.columns.values())}
        named = not settings.column_names and any(cell.strip().lower() in known for cell in first)
        fits = settings.column_names or _headerless(first, layout)
        # A file that looks like neither is taken to have a header, so that the columns it lacks
        # are reported against the names that stand there.
        has_header = named or not fits
    if settings.column_names:
        return list(settings.column_names), bool(settings.header)
    if has_header:
        return [cell.strip() for cell in first], True
    columns = _headerless(first, layout)
    if columns is None:
        raise ValueError(
            f"{path}: has no header and {len(first)} columns; name them in data.column_names"
        )
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
    """What a loader of `datasets` makes of a file.

    Raises:
      ValueError: the file is damaged, or not of its format.
    """
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        return ArrowTable(load(str(path)), str(path), files=(path,))
    # A footer or a schema that cannot be read is Arrow's error, which may be a plain OSError; what
    # lies before it is datasets' own.
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
    """The rows of several files, one after the other."""
    tables = [open_file(path, settings, layout) for path in paths]
    return tables[0] if len(tables) == 1 else JoinedTable(tables)
