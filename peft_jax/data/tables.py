"""Tables of rows with access by index, without holding all rows as Python objects."""

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
"""A row: values by column name."""


Bytes = mmap.mmap | bytes
"""A file's bytes: memory-mapped, or `bytes` for an empty file, which cannot be mapped."""


@runtime_checkable
class Table(Protocol):
    """Rows with access by index.

    Attributes:
      name: Name in messages.
      files: Files that the rows are read from; empty for rows in memory.
    """

    name: str
    files: tuple[Path, ...]

    def __len__(self) -> int:
        """Returns the number of rows."""

    def __getitem__(self, index: int) -> Row:
        """Returns one row; raises `BadRowError` if it cannot be read."""

    def where(self, index: int) -> str:
        """Returns the location of a row: file and line, or data set and row number."""


class MemoryTable:
    """Rows in memory."""

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
          rows: Rows; one that is not a mapping is a bad row.
          name: Name in messages.
          unit: Name of a row in messages.
          files: Files that the rows were read from.
        """
        self.name = name
        self.files = files
        self._rows = rows
        self._unit = unit

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Returns one row."""
        return _as_row(self._rows[index])

    def where(self, index: int) -> str:
        """Returns the table's name and the row's number, from 1."""
        return f"{self.name}, {self._unit} {index + 1}"


class ArrowTable:
    """Rows of a `datasets.Dataset`, read from its memory-mapped files on access."""

    def __init__(self, dataset: Any, name: str, *, files: tuple[Path, ...] | None = None):
        """Wraps a data set.

        Args:
          dataset: A `datasets.Dataset`.
          name: Name in messages.
          files: Source files; None: the files that the data set maps into memory.
        """
        self.name = name
        if files is None:
            files = tuple(Path(file["filename"]) for file in dataset.cache_files)
        self.files = files
        self.dataset = dataset

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        """Returns one row."""
        return self.dataset[int(index)]

    def where(self, index: int) -> str:
        """Returns the data set's name and the row's number, from 1."""
        return f"{self.name}, row {index + 1}"


class RecordTable:
    """Records of a file, indexed by byte offsets and parsed on access.

    The file is memory-mapped, and the index takes 24 bytes per record. A gzip file is unpacked to a
    temporary file, which is deleted with the table.
    """

    def __init__(
        self,
        path: Path,
        find: Callable[[Bytes], "Records"],
        parse: Callable[[str], Row],
    ):
        """Indexes the records.

        Args:
          path: File; if its name ends in ".gz", it is unpacked first.
          find: Finds the records in the file's bytes.
          parse: Turns a record's text into a row, or raises `BadRowError`.

        Raises:
          ValueError: A gzip file is damaged.
        """
        self.name = str(path)
        self.files: tuple[Path, ...] = (path,)
        self._bytes = _map_bytes(path)
        self._parse = parse
        self._records = find(self._bytes)

    def parsed_by(self, parse: Callable[[str], Row], *, skip: int = 0) -> "RecordTable":
        """Returns the table without its first `skip` records, parsed by another function."""
        table = copy.copy(self)
        table._parse = parse
        table._records = self._records[skip:]
        return table

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._records.starts)

    def __getitem__(self, index: int) -> Row:
        """Returns one record's row."""
        raw = self._bytes[int(self._records.starts[index]) : int(self._records.stops[index])]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError("not UTF-8", str(error)) from None
        return self._parse(text)

    def where(self, index: int) -> str:
        """Returns the file and the number of the record's first line."""
        return f"{self.name}:{int(self._records.lines[index])}"


class JoinedTable:
    """Concatenation of several tables."""

    def __init__(self, tables: Sequence[Table]):
        """Concatenates tables in order."""
        self.name = ", ".join(table.name for table in tables)
        self.files = tuple(file for table in tables for file in table.files)
        self._tables = tables
        self._ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        """Returns the total number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        """Returns one row."""
        table, local = self._find(index)
        return table[local]

    def where(self, index: int) -> str:
        """Returns the location of a row in its own table."""
        table, local = self._find(index)
        return table.where(local)

    def _find(self, index: int) -> tuple[Table, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return self._tables[number], index - before


class LanguagesTable(JoinedTable):
    """The same rows in several languages, concatenated by language.

    Attributes:
      parts: Table of each language.
    """

    def __init__(self, parts: Sequence[Table]):
        """Concatenates the tables of the languages."""
        super().__init__(parts)
        self.parts = tuple(parts)


class SelectedTable:
    """A selection of another table's rows.

    With `without`, memory is needed for the excluded rows only.
    """

    def __init__(self, table: Table, rows: np.ndarray, *, without: bool = False):
        """Selects rows.

        Args:
          table: Table to select from.
          rows: Int64 [n], sorted distinct indices.
          without: Whether to select all rows except these.
        """
        self.name = table.name
        self.files = table.files
        self._table = table
        self._rows = rows
        self._without = without
        # Row i of the rest has index i plus the number of excluded rows before it.
        self._stays_before = rows - np.arange(len(rows))

    def __len__(self) -> int:
        """Returns the number of selected rows."""
        return len(self._table) - len(self._rows) if self._without else len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Returns one row."""
        return self._table[self._original(index)]

    def where(self, index: int) -> str:
        """Returns the location of a row in the original table."""
        return self._table.where(self._original(index))

    def _original(self, index: int) -> int:
        if self._without:
            return index + int(np.searchsorted(self._stays_before, index, side="right"))
        return int(self._rows[index])


class AlignedTable:
    """Rows that combine the same row of several tables."""

    def __init__(self, tables: Mapping[str, Table], *, column: str = "text"):
        """Joins tables by row number.

        Args:
          tables: Table of each column of the joined rows.
          column: Column of the tables that is used.

        Raises:
          ValueError: The tables have different numbers of rows.
        """
        self.name = " and ".join(table.name for table in tables.values())
        self.files = tuple(file for table in tables.values() for file in table.files)
        self._tables = tables
        self._column = column
        sizes = {table.name: len(table) for table in tables.values()}
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise ValueError(f"aligned tables must have the same number of rows, but {counts} rows")

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(next(iter(self._tables.values())))

    def __getitem__(self, index: int) -> Row:
        """Returns one row.

        Raises:
          BadRowError: The tables' rows have different ids.
        """
        rows = {name: table[index] for name, table in self._tables.items()}
        ids = {str(row.get("id")) for row in rows.values()}
        if len(ids) > 1:
            raise BadRowError("not aligned", f"the rows' ids are {', '.join(sorted(ids))}")
        return {name: row.get(self._column) for name, row in rows.items()}

    def where(self, index: int) -> str:
        """Returns the location of a row in the first table."""
        return next(iter(self._tables.values())).where(index)


class Records:
    """Byte ranges of a file's records.

    Attributes:
      starts: Int64 [records], first byte of each record.
      stops: Int64 [records], one past the last byte.
      lines: Int64 [records], number of the first line, from 1.
    """

    def __init__(self, starts: Any, stops: Any, lines: Any):
        """Converts three sequences of the same length."""
        self.starts = np.asarray(starts, np.int64)
        self.stops = np.asarray(stops, np.int64)
        self.lines = np.asarray(lines, np.int64)

    def __getitem__(self, keep: Any) -> "Records":
        """Returns the records selected by an index or a mask."""
        return Records(self.starts[keep], self.stops[keep], self.lines[keep])


def find_lines(data: Bytes, *, keep_blank: bool = False) -> Records:
    r"""Finds the lines of a file, without line ends.

    Args:
      data: Bytes of the file. A byte order mark at the start is skipped.
      keep_blank: Whether to keep blank lines.

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
    # Only short lines are checked, since a long line of spaces is a fault worth reporting.
    blank = np.zeros(len(starts), bool)
    for index in np.flatnonzero(stops - starts <= 8):
        blank[index] = not data[int(starts[index]) : int(stops[index])].strip()
    ends_in_return = np.array([data[stop - 1 : stop] == b"\r" for stop in stops.tolist()], bool)
    records.stops = stops - (ends_in_return & ~blank)
    return records[~blank]


def find_paragraphs(data: Bytes) -> Records:
    r"""Finds the paragraphs of a file, which blank lines separate.

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
    """Returns the whole file as one record; no record if it is empty."""
    first = _after_mark(data)
    return Records([first], [len(data)], [1]) if len(data) > first else Records([], [], [])


_JSON_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
"""A whole string, or a structural character of JSON."""


def find_json_items(data: Bytes, name: str) -> Records:
    r"""Finds the items of a JSON array, to be parsed separately.

    Only strings, brackets and commas are examined, so that a fault inside an item affects that item
    alone.

    Args:
      data: Bytes of the file, which begin with a bracket.
      name: Name of the file in messages.

    Raises:
      ValueError: The array or a string in it does not end, or other content follows the array.

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
        raise ValueError(f"{name}:{line_of(first)}: broken JSON: content follows the array")
    return Records(starts, stops, [line_of(start) for start in starts])


def _strip(data: Bytes, start: int, stop: int) -> tuple[int, int]:
    """Returns a byte range without white space at its ends."""
    text = data[start:stop]
    first = start + len(text) - len(text.lstrip())
    return first, max(first, start + len(text.rstrip()))


def find_csv_records(data: Bytes, delimiter: str) -> Records:
    r"""Finds the records of a csv file, whose quoted fields may hold line ends.

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
            # Latin-1 maps every byte to one character; delimiters and quotes are ASCII.
            yield data[start:stop].decode("latin-1") + "\n"

    starts, stops, numbers = [], [], []
    before = 0
    reader = csv.reader(text_lines(), delimiter=delimiter)
    while True:
        try:
            empty = not next(reader)
        except StopIteration:
            break
        # Still a record, which raises its own error when it is read.
        except csv.Error:
            empty = False
        if not empty:
            starts.append(lines.starts[before])
            stops.append(lines.stops[consumed - 1])
            numbers.append(before + 1)
        before = consumed
    return Records(starts, stops, numbers)


def parse_json(text: str) -> Row:
    """Parses a row from one line of JSON.

    Raises:
      BadRowError: The line is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRowError("broken JSON", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRowError("nested too deeply", "its brackets are nested too deeply") from None
    # Python limits the digits of a number.
    except ValueError as error:
        raise BadRowError("broken JSON", str(error)) from None
    return _as_row(value)


def csv_parser(columns: Sequence[str], delimiter: str, *, quoting: bool) -> Callable[[str], Row]:
    """Returns a parser of csv or tsv records.

    Args:
      columns: Names of the columns, in order.
      delimiter: Character between fields.
      quoting: Whether double quotes enclose fields.

    Returns:
      A function from a record's text to its row. It raises `BadRowError` if the record has another
      number of fields, or a quote does not close.
    """

    def parse(text: str) -> Row:
        fields = split_record(text, delimiter, quoting=quoting)
        if len(fields) != len(columns):
            raise BadRowError(
                "wrong number of columns",
                f"has {len(fields)}, must have {len(columns)} ({', '.join(columns)})",
            )
        return dict(zip(columns, fields, strict=True))

    return parse


def split_record(text: str, delimiter: str, *, quoting: bool) -> list[str]:
    """Splits one csv or tsv record into fields.

    Raises:
      BadRowError: A quote does not close, or a carriage return is outside of quotes.

    Example:
      >>> split_record('a,"b, c"', ",", quoting=True)
      ['a', 'b, c']
      >>> split_record('"Well, he said', "|", quoting=False)
      ['"Well, he said']
    """
    if not quoting:
        return text.rstrip("\r").split(delimiter)
    try:
        # Lines must end as in `find_csv_records`; otherwise a carriage return would end the record.
        return next(csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True))
    except csv.Error as error:
        detail, lines = str(error), text.count("\n") + 1
        if "new-line character" in detail:
            detail = (
                "a field without quotation marks has a carriage return; lines must end in a"
                " line feed"
            )
        elif lines > 1:
            detail += f"; the record has {lines:,} lines, so a quotation mark may not be closed"
        raise BadRowError("broken CSV", detail) from None


def _as_row(value: Any) -> Row:
    if not isinstance(value, Mapping):
        raise BadRowError("wrong type", f"a row must be an object, not a {type(value).__name__}")
    return value


def _after_mark(data: Bytes) -> int:
    """Returns the offset after a UTF-8 byte order mark, if any."""
    return 3 if data[:3] == b"\xef\xbb\xbf" else 0


def first_letter(data: Bytes) -> str:
    """Returns the first character that is not white space, if it is ASCII; "" if there is none."""
    found = re.compile(rb"\s*+(\S)").match(data, _after_mark(data))
    return found[1].decode("ascii", "replace") if found else ""


def _map_bytes(path: Path) -> Bytes:
    """Maps a file into memory; unpacks a gzip file first."""
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
