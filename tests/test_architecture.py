"""The rooms of the house: who imports whom, and the old names of moved modules."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from peft_jax.moved import MOVED

ROOT = Path(__file__).parents[1]


def test_rooms_import_downwards_and_in_no_circle():
    # A process of its own: the linter keeps hold of the standard output.
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    found = subprocess.run(
        [sys.executable, "-c", code, "setup.cfg", "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_has_its_old_name_too(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        module = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    assert dir(module) == dir(new)
    assert module.__getattr__("__name__") == MOVED[old]
