"""Defines a row."""

from collections.abc import Mapping
from typing import Any

from peft_jax.data.bad_rows import BadRowError

Row = Mapping[str, Any]
"""A row: values by column name."""


def as_row(value: Any) -> Row:
    """Returns a value as a row; raises `BadRowError` if it is not a mapping."""
    if not isinstance(value, Mapping):
        raise BadRowError("wrong type", f"a row must be an object, not a {type(value).__name__}")
    return value
