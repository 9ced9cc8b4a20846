"""Tables of rows with access by index, without holding all rows as Python objects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.rows import Row, as_row


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
        return as_row(self._rows[index])

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
