"""The documentation's table of Hugging Face PEFT's types agrees with PEFT and with the methods."""

from pathlib import Path

import pytest

from peft_jax.adapters import METHODS, peft_forms

peft = pytest.importorskip("peft")

HEADER = ("here", "loads", "saves")
PAGE = Path(__file__).parents[2] / "docs" / "from_peft_and_trl.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    """Returns the rows of the table by type."""
    section = PAGE.read_text().split("## Every type of PEFT")[1].split("\n## ")[0]
    lines = [
        line for line in section.splitlines() if line.startswith("| `") and "peft_type" not in line
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0].strip("`"): dict(zip(HEADER, row[1:4], strict=True)) for row in cells}


def test_the_table_has_every_type_of_peft(rows):
    assert set(rows) == {one.value for one in peft.PeftType}


def test_the_table_says_which_types_load(rows):
    loaded = {form.peft_type for form in peft_forms()}
    assert {name for name, row in rows.items() if row["loads"] == "yes"} == loaded


def test_the_table_says_which_types_are_saved_by_which_methods(rows):
    forms = {name: method().peft_form() for name, method in METHODS.items()}
    saved: dict[str, set[str]] = {}
    for name, form in forms.items():
        if form is not None:
            saved.setdefault(form.peft_type, set()).add(f"`{name}`")
    found = {
        name: set(row["here"].split(", ")) for name, row in rows.items() if row["saves"] == "yes"
    }
    assert found == saved
    assert all(row["saves"] == "yes" or row["loads"] == "no" for row in rows.values())
