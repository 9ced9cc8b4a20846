"""The rooms of the house: who imports whom, and the old names of moved modules."""

import ast
import configparser
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_pallas.renamed import RENAMED
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


@pytest.mark.parametrize("first", ["kernels_pallas", "peft_jax"])
def test_all_old_names_import_in_a_new_process(first):
    """Each package keeps its own old names, whether or not the other has been imported."""
    names = RENAMED if first == "kernels_pallas" else MOVED | RENAMED
    code = f"import importlib, {first}\nfor name in {list(names)}: importlib.import_module(name)"
    found = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    for old, new in names.items():
        assert f"{old} is now {new}" in found.stderr


def test_the_kernels_import_nothing_heavy():
    code = "import sys, kernels_pallas; sys.exit('jax' in sys.modules or 'peft_jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("old", MOVED | RENAMED)
def test_a_moved_module_has_its_old_name_too(old):
    sys.modules.pop(old, None)
    wanted = (MOVED | RENAMED)[old]
    with pytest.warns(DeprecationWarning, match=wanted):
        module = importlib.import_module(old)
    new = importlib.import_module(wanted)
    assert dir(module) == dir(new)
    assert module.__getattr__("__name__") == wanted


def _imported(folder: str) -> set[str]:
    """Returns the top-level names of all modules that a folder's files import."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"peft_jax", "kernels_pallas", "eval", "configs"}


def _declared(*lists: str) -> set[str]:
    return {
        re.split(r"[^\w.-]", line)[0].lower().replace("_", "-")
        for text in lists
        for line in text.split("\n")
        if line
    }


@pytest.mark.parametrize("folder", ["kernels_pallas", "peft_jax", "eval"])
def test_what_is_imported_is_declared(folder):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    needed = [setup["options"]["install_requires"], extras["wandb"]]
    declared = _declared(*needed, *([extras["eval"]] if folder == "eval" else []))
    packages = importlib.metadata.packages_distributions()
    for name in _imported(folder):
        # What is not installed, as an optional package may be, is declared by its own name.
        owners = {owner.lower().replace("_", "-") for owner in packages.get(name, [name])}
        assert owners & declared, name
