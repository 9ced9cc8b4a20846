"""Indexes the records of a file by byte offsets, without holding them as Python objects."""

import copy
import csv
import gzip
import io
import mmap
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.rows import Row

Bytes = mmap.mmap | bytes
"""A file's bytes: memory-mapped, or `bytes` for an empty file, which cannot be mapped."""


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
