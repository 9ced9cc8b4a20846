"""Rows by index, wherever they come from, without holding them as Python objects."""

import copy
import csv
import gzip
import io
import json
import mmap
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from peft_jax.data.bad_rows import BadRowError

Row = Mapping[str, Any]
"""One row: values by column name."""


Bytes = mmap.mmap | bytes
"""A file's bytes, memory-mapped; an empty file cannot be."""


@runtime_checkable
class Table(Protocol):
    """Rows addressed by index.

    Attributes:
      name: What messages call the table.
      files: The files that the rows are read from; none for rows that were made in memory.
    """

    name: str
    files: tuple[Path, ...]

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: int) -> Row:
        """One row; raises `BadRowError` where it cannot be read."""

    def where(self, index: int) -> str:
        """Where to look for the row: a file and line, or a data set's name and row number."""


class MemoryTable:
    """Rows that are in memory already."""

    def __init__(
        self,
        rows: Sequence[Any],
        name: str,
        *,
        unit: str = "row",
        files: tuple[Path, ...] = (),
    ):
        """Wraps a sequence.

        Args:
          rows: the rows; one that is no mapping is a bad row.
          name: what messages call the table.
          unit: what messages call a row.
          files: the files that the rows were read from.
        """
        self.name = name
        self.files = files
        self._rows = rows
        self._unit = unit

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """One row."""
        return _as_row(self._rows[index])

    def where(self, index: int) -> str:
        """The table's name and the row's number, from 1."""
        return f"{self.name}, {self._unit} {index + 1}"


class ArrowTable:
    """Rows of a `datasets.Dataset`, read from its memory-mapped files as they are asked for."""

    def __init__(self, dataset: Any, name: str, *, files: tuple[Path, ...] | None = None):
        """Wraps a data set.

        Args:
          dataset: a `datasets.Dataset`.
          name: what messages call it.
          files: the files that it was made of; None: those that it maps into memory.
        """
        self.name = name
        if files is None:
            files = tuple(Path(file["filename"]) for file in dataset.cache_files)
        self.files = files
        self.dataset = dataset

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        """One row."""
        return self.dataset[int(index)]

    def where(self, index: int) -> str:
        """The data set's name and the row's number, from 1."""
        return f"{self.name}, row {index + 1}"


class RecordTable:
    """Records of a file, found by their byte offsets and parsed as they are asked for.

    The file is memory-mapped; what is held is 24 bytes a record. A gzip file is unpacked to a
    temporary file that is gone when the table is.
    """

    def __init__(
        self,
        path: Path,
        find: Callable[[Bytes], "Records"],
        parse: Callable[[str], Row],
    ):
        """Finds the records.

        Args:
          path: the file; a name that ends in ".gz" is unpacked first.
          find: finds the records in the file's bytes.
          parse: makes a row of a record's text, or raises `BadRowError`.

        Raises:
          ValueError: if a gzip file is damaged.
        """
        self.name = str(path)
        self.files: tuple[Path, ...] = (path,)
        self._bytes = _map_bytes(path)
        self._parse = parse
        self._records = find(self._bytes)

    def parsed_by(self, parse: Callable[[str], Row], *, skip: int = 0) -> "RecordTable":
        """The same records after the first `skip`, made into rows by another function."""
        table = copy.copy(self)
        table._parse = parse
        table._records = self._records[skip:]
        return table

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._records.starts)

    def __getitem__(self, index: int) -> Row:
        """One record's row."""
        raw = self._bytes[int(self._records.starts[index]) : int(self._records.stops[index])]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError("not UTF-8", str(error)) from None
        return self._parse(text)

    def where(self, index: int) -> str:
        """The file and the number of the record's first line."""
        return f"{self.name}:{int(self._records.lines[index])}"


class JoinedTable:
    """Several tables, one after the other."""

    def __init__(self, tables: Sequence[Table]):
        """Joins tables in their order."""
        self.name = ", ".join(table.name for table in tables)
        self.files = tuple(file for table in tables for file in table.files)
        self._tables = tables
        self._ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        """How many rows there are in all."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        """One row."""
        table, local = self._find(index)
        return table[local]

    def where(self, index: int) -> str:
        """As the row's own table says."""
        table, local = self._find(index)
        return table.where(local)

    def _find(self, index: int) -> tuple[Table, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return self._tables[number], index - before


class LanguagesTable(JoinedTable):
    """The same rows in several languages, one language after the other.

    Attributes:
      parts: the rows of each language.
    """

    def __init__(self, parts: Sequence[Table]):
        """Joins the languages' tables."""
        super().__init__(parts)
        self.parts = tuple(parts)


class SelectedTable:
    """Some rows of another table.

    The rows that others hold out are skipped by arithmetic, so nothing is held for those that stay.
    """

    def __init__(self, table: Table, rows: np.ndarray, *, without: bool = False):
        """Selects.

        Args:
          table: the rows to select from.
          rows: int64 [n], sorted indices without repetition.
          without: select all rows but these.
        """
        self.name = table.name
        self.files = table.files
        self._table = table
        self._rows = rows
        self._without = without
        # Row i of those that stay is i plus the number of left-out rows before it.
        self._stays_before = rows - np.arange(len(rows))

    def __len__(self) -> int:
        """How many rows are selected."""
        return len(self._table) - len(self._rows) if self._without else len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """One row."""
        return self._table[self._original(index)]

    def where(self, index: int) -> str:
        """As the table itself says."""
        return self._table.where(self._original(index))

    def _original(self, index: int) -> int:
        if self._without:
            return index + int(np.searchsorted(self._stays_before, index, side="right"))
        return int(self._rows[index])


class AlignedTable:
    """Rows that are spread over several tables, the same row of each belonging together."""

    def __init__(self, tables: Mapping[str, Table], *, column: str = "text"):
        """Joins tables side by side.

        Args:
          tables: a table for each column of the joined rows.
          column: the column of the tables that is taken.

        Raises:
          ValueError: if the tables have different numbers of rows.
        """
        self.name = " and ".join(table.name for table in tables.values())
        self.files = tuple(file for table in tables.values() for file in table.files)
        self._tables = tables
        self._column = column
        sizes = {table.name: len(table) for table in tables.values()}
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise ValueError(f"aligned data have a row of each for every row, but {counts} rows")

    def __len__(self) -> int:
        """How many rows there are."""
        return len(next(iter(self._tables.values())))

    def __getitem__(self, index: int) -> Row:
        """One row.

        Raises:
          BadRowError: if the tables give their rows different ids.
        """
        rows = {name: table[index] for name, table in self._tables.items()}
        ids = {str(row.get("id")) for row in rows.values()}
        if len(ids) > 1:
            raise BadRowError("not aligned", f"the rows' ids are {', '.join(sorted(ids))}")
        return {name: row.get(self._column) for name, row in rows.items()}

    def where(self, index: int) -> str:
        """Where the row is in the first table."""
        return next(iter(self._tables.values())).where(index)


class Records:
    """Where the records of a file are.

    Attributes:
      starts: int64 [records], the first byte of each.
      stops: int64 [records], one past its last byte.
      lines: int64 [records], the number of its first line, from 1.
    """

    def __init__(self, starts: Any, stops: Any, lines: Any):
        """Takes three sequences of the same length."""
        self.starts = np.asarray(starts, np.int64)
        self.stops = np.asarray(stops, np.int64)
        self.lines = np.asarray(lines, np.int64)

    def __getitem__(self, keep: Any) -> "Records":
        """Those that an index or a mask selects."""
        return Records(self.starts[keep], self.stops[keep], self.lines[keep])


def find_lines(data: Bytes, *, keep_blank: bool = False) -> Records:
    r"""The lines of a file, without their ends; blank ones are left out.

    Args:
      data: the file's bytes. A byte order mark at the start is skipped.
      keep_blank: keep blank lines too.

    Example:
      >>> records = find_lines(b"one\n\nthree\r\n")
      >>> records.starts.tolist(), records.stops.tolist(), records.lines.tolist()
      ([0, 5], [3, 10], [1, 3])
    """
    size, first = len(data), _after_mark(data)
    if size == first:
        return Records([], [], [])
    chunk = 1 << 24
    ends = [
        start + np.flatnonzero(np.frombuffer(data[start : start + chunk], np.uint8) == ord("\n"))
        for start in range(first, size, chunk)
    ]
    stops = np.concatenate(ends)
    if data[size - 1 : size] != b"\n":
        stops = np.append(stops, size)
    starts = np.concatenate([[first], stops[:-1] + 1]).astype(np.int64)
    records = Records(starts, stops, np.arange(1, len(stops) + 1))
    if keep_blank:
        return records
    # Only short lines are looked at: a long one of nothing but spaces is a fault worth reporting.
    blank = np.zeros(len(starts), bool)
    for index in np.flatnonzero(stops - starts <= 8):
        blank[index] = not data[int(starts[index]) : int(stops[index])].strip()
    ends_in_return = np.array([data[stop - 1 : stop] == b"\r" for stop in stops.tolist()], bool)
    records.stops = stops - (ends_in_return & ~blank)
    return records[~blank]


def find_paragraphs(data: Bytes) -> Records:
    r"""The paragraphs of a file: runs of lines between blank ones.

    Example:
      >>> records = find_paragraphs(b"one\ntwo\n\n\nthree")
      >>> records.starts.tolist(), records.stops.tolist(), records.lines.tolist()
      ([0, 10], [7, 15], [1, 5])
    """
    lines = find_lines(data)
    if not len(lines.starts):
        return lines
    first = np.concatenate([[True], np.diff(lines.lines) > 1])
    last = np.concatenate([first[1:], [True]])
    return Records(lines.starts[first], lines.stops[last], lines.lines[first])


def find_whole(data: Bytes) -> Records:
    """The whole file as one record; none if it is empty."""
    first = _after_mark(data)
    return Records([first], [len(data)], [1]) if len(data) > first else Records([], [], [])


_JSON_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
"""A whole string, or one of the characters that JSON's structure is made of."""


def find_json_items(data: Bytes, name: str) -> Records:
    r"""The items of a JSON array, each of which is then parsed by itself.

    Only strings, brackets and commas are looked at: what is wrong inside an item is wrong with that
    item alone.

    Args:
      data: the file's bytes, which begin with a bracket.
      name: the file's name, for messages.

    Raises:
      ValueError: the array or a string in it does not end, or something follows the array.

    Example:
      >>> records = find_json_items(b'[{"a": [1, 2]},\n {"b": "]"}]', "a.json")
      >>> records.starts.tolist(), records.stops.tolist(), records.lines.tolist()
      ([1, 17], [14, 27], [1, 2])
    """
    newlines = find_lines(data, keep_blank=True)

    def line_of(offset: int) -> int:
        return max(int(np.searchsorted(newlines.starts, offset, side="right")), 1)

    starts: list[int] = []
    stops: list[int] = []
    depth = start = closed = 0
    for mark in _JSON_MARK.finditer(data):
        at = mark.start()
        kind = data[at : at + 1]
        if mark.end() - at > 1:
            continue
        if kind == b'"':
            raise ValueError(f"{name}:{line_of(at)}: broken JSON: a string does not end")
        depth += (kind in (b"[", b"{")) - (kind in (b"]", b"}"))
        if depth == 1 and not start:
            start = at + 1
        elif depth == 0 or (depth == 1 and kind == b","):
            first, last = _strip(data, start, at)
            # An empty array has no item.
            if last > first or kind == b"," or starts:
                starts.append(first)
                stops.append(last)
            start = at + 1
        if depth <= 0:
            closed = at + 1
            break
    if not closed:
        line = line_of(_strip(data, start, len(data))[0])
        raise ValueError(f"{name}:{line}: broken JSON: the array does not end after this item")
    first, last = _strip(data, closed, len(data))
    if last > first:
        raise ValueError(f"{name}:{line_of(first)}: broken JSON: something follows the array")
    return Records(starts, stops, [line_of(start) for start in starts])


def _strip(data: Bytes, start: int, stop: int) -> tuple[int, int]:
    """A stretch of bytes without white space at its ends."""
    text = data[start:stop]
    first = start + len(text) - len(text.lstrip())
    return first, max(first, start + len(text.rstrip()))


def find_csv_records(data: Bytes, delimiter: str) -> Records:
    r"""The records of a file whose fields may hold line ends between double quotes.

    Example:
      >>> records = find_csv_records(b'a,"x\ny"\nb,z\n', ",")
      >>> records.starts.tolist(), records.stops.tolist(), records.lines.tolist()
      ([0, 8], [7, 11], [1, 3])
    """
    lines = find_lines(data, keep_blank=True)
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    consumed = 0

    def text_lines() -> Iterator[str]:
        nonlocal consumed
        for start, stop in zip(lines.starts.tolist(), lines.stops.tolist(), strict=True):
            consumed += 1
            # One character a byte: delimiters and quotes are ASCII, and no byte is refused here.
            yield data[start:stop].decode("latin-1") + "\n"

    starts, stops, numbers = [], [], []
    before = 0
    reader = csv.reader(text_lines(), delimiter=delimiter)
    while True:
        try:
            empty = not next(reader)
        except StopIteration:
            break
        # A record too, which is refused by itself when it is read.
        except csv.Error:
            empty = False
        if not empty:
            starts.append(lines.starts[before])
            stops.append(lines.stops[consumed - 1])
            numbers.append(before + 1)
        before = consumed
    return Records(starts, stops, numbers)


def parse_json(text: str) -> Row:
    """A row from one line of JSON.

    Raises:
      BadRowError: if the line is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRowError("broken JSON", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRowError("nested too deeply", "its brackets are nested too deeply") from None
    # A number of more digits than Python converts.
    except ValueError as error:
        raise BadRowError("broken JSON", str(error)) from None
    return _as_row(value)


def csv_parser(columns: Sequence[str], delimiter: str, *, quoting: bool) -> Callable[[str], Row]:
    """What makes a row of one csv or tsv record.

    Args:
      columns: the columns' names in order.
      delimiter: the character between fields.
      quoting: whether double quotes enclose fields.

    Returns:
      A function from a record's text to its row, which raises `BadRowError` if the record has
      another number of fields or its quotes do not close.
    """

    def parse(text: str) -> Row:
        fields = split_record(text, delimiter, quoting=quoting)
        if len(fields) != len(columns):
            raise BadRowError(
                "wrong number of columns",
                f"has {len(fields)}, wants {len(columns)} ({', '.join(columns)})",
            )
        return dict(zip(columns, fields, strict=True))

    return parse


def split_record(text: str, delimiter: str, *, quoting: bool) -> list[str]:
    """The fields of one csv or tsv record.

    Raises:
      BadRowError: if a quote does not close, or a carriage return stands outside quotes.

    Example:
      >>> split_record('a,"b, c"', ",", quoting=True)
      ['a', 'b, c']
      >>> split_record('"Well, he said', "|", quoting=False)
      ['"Well, he said']
    """
    if not quoting:
        return text.rstrip("\r").split(delimiter)
    try:
        # Lines end as in `find_csv_records`: a carriage return alone would cut the record short.
        return next(csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True))
    except csv.Error as error:
        detail, lines = str(error), text.count("\n") + 1
        if "new-line character" in detail:
            detail = (
                "a carriage return stands in a field without quotation marks; lines should end in"
                " a line feed"
            )
        elif lines > 1:
            detail += f"; the record has {lines:,} lines: is a quotation mark not closed?"
        raise BadRowError("broken CSV", detail) from None


def _as_row(value: Any) -> Row:
    if not isinstance(value, Mapping):
        raise BadRowError("wrong type", f"a row is an object, and this is a {type(value).__name__}")
    return value


def _after_mark(data: Bytes) -> int:
    """The first byte after a UTF-8 byte order mark, if there is one."""
    return 3 if data[:3] == b"\xef\xbb\xbf" else 0


def first_letter(data: Bytes) -> str:
    """The first character that is no white space, if it is an ASCII one; "" if there is none."""
    found = re.compile(rb"\s*+(\S)").match(data, _after_mark(data))
    return found[1].decode("ascii", "replace") if found else ""


def _map_bytes(path: Path) -> Bytes:
    """The bytes of a file, memory-mapped; of a gzip file, what is packed in it."""
    with tempfile.TemporaryFile() if path.suffix == ".gz" else path.open("rb") as file:
        if path.suffix == ".gz":
            try:
                with gzip.open(path, "rb") as packed:
                    shutil.copyfileobj(packed, file)
            except (OSError, EOFError) as error:
                raise ValueError(f"{path} is damaged: {error}") from None
            file.flush()
        if file.seek(0, io.SEEK_END) == 0:
            return b""
        # The map keeps the file alive after it is closed.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
