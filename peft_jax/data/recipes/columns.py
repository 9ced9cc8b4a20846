"""Finds columns of the data that a recipe does not read."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from peft_jax.data.bad_rows import BadRowError, as_bad_row
from peft_jax.data.recipes.base import Recipe
from peft_jax.data.rows import Row
from peft_jax.data.tables import Table

_log = logging.getLogger(__name__)

_ROWS_LOOKED_AT = 64


def warn_of_unread_columns(recipe: Recipe, table: Table) -> None:
    """Logs a warning that names nonempty columns which the recipe does not read.

    Args:
      recipe: Configured recipe.
      table: Rows, of which a sample is examined.
    """
    unread = unread_columns(recipe, table)
    if unread:
        _log.warning(
            "Recipe %r does not read %s %s of %s. To use one, set data.columns, which maps the"
            " recipe's fields to columns; the fields are %s.",
            recipe.name,
            "columns" if len(unread) > 1 else "column",
            ", ".join(map(repr, unread)),
            table.name,
            ", ".join(recipe.fields),
        )


def unread_columns(recipe: Recipe, table: Table) -> list[str]:
    """Returns the nonempty columns of usable rows that the recipe never reads.

    Columns of the recipe's published layouts without a header are ignored.
    """
    held: dict[str, None] = {}
    read = {name for layout in recipe.headerless for name in layout}
    size = len(table)
    for index in range(0, size, max(size // _ROWS_LOOKED_AT, 1)):
        try:
            with as_bad_row():
                row = _WatchedRow(table[index])
                recipe.example(row)
        except BadRowError:
            continue
        read |= row.read
        held |= dict.fromkeys(name for name, value in row.row.items() if _holds(value))
    return [name for name in held if name not in read]


class _WatchedRow(Mapping[str, Any]):
    """A row that records which of its columns are read."""

    def __init__(self, row: Row):
        self.row = row
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self.row[name]
        self.read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.row

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)


def _holds(value: Any) -> bool:
    """Returns whether a value is neither null nor empty."""
    return value is not None and value != "" and value != [] and value != {}
