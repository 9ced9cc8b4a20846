"""Checks settings, with errors that name the given value and what would work."""

import math
from collections.abc import Iterable
from typing import Any

from peft_jax.core.suggest import did_you_mean


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, but is {value!r}")


def check_positive_int(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, but is {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer of at least zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, but is {value!r}")


def check_finite(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number of at least zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, but is {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless 0 <= `value` < 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, but is {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError, naming near matches, unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(
            f"{name} is {value!r}, which is not known{did_you_mean(str(value), choices)}"
        )
