"""Tests the conversion of settings to their types."""

import dataclasses
import math

import pytest

from peft_jax.core.typed_settings import from_mapping
from peft_jax.data import DataSettings


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    share: float | None = None


@pytest.mark.parametrize("name", ["rate", "share"])
@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, 10**400, -(10**5000)],
    ids=["inf", "-inf", "nan", "400 digits", "5000 digits"],
)
def test_numbers_that_are_not_finite_floats_are_rejected(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number; it is ") as caught:
        from_mapping(Settings, {name: value})
    assert len(str(caught.value)) < 300


def test_the_largest_float_is_accepted():
    assert from_mapping(Settings, {"rate": -1.7976931348623157e308}).rate < -1e308


@pytest.mark.parametrize("rows", [math.inf, math.nan, 2.5, -0.1])
def test_held_out_rows_that_are_no_number_of_rows_are_rejected(rows):
    with pytest.raises(ValueError, match=r"data\.hold_out is .* a fraction below 1"):
        DataSettings(recipe="alpaca", path="rows.jsonl", hold_out=rows)
