"""Columns of the data that a recipe does not read."""

from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from peft_jax.data.bad_rows import BadRowError, as_bad_row
from peft_jax.data.recipes.base import Recipe
from peft_jax.data.tables import Row, Table

_ROWS_LOOKED_AT = 64


def warn_of_unread_columns(recipe: Recipe, table: Table) -> None:
    """Names the columns that hold something and that the recipe reads in no row, once.

    Args:
      recipe: the recipe, configured.
      table: the rows; a few of them are looked at.
    """
    unread = unread_columns(recipe, table)
    if unread:
        logging.warning(
            "Recipe %r does not read %s %s of %s. Where one is to be used, data.columns says which"
            " column a field is read from: the fields are %s.",
            recipe.name,
            "columns" if len(unread) > 1 else "column",
            ", ".join(map(repr, unread)),
            table.name,
            ", ".join(recipe.fields),
        )


def unread_columns(recipe: Recipe, table: Table) -> list[str]:
    """The columns that hold something in rows that can be used, and are read in none of them.

    Columns that the recipe knows to be in a published layout without a header are left out.
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
    """A row that remembers which of its columns are read."""

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
    """Whether a column holds something: neither null nor empty."""
    return value is not None and value != "" and value != [] and value != {}
