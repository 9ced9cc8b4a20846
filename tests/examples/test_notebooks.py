"""The notebooks run top to bottom, and their set-up does what Colab's runtimes need."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run(name: str) -> str:
    """Runs a notebook, and returns what it prints."""
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / "examples")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )


def set_up_of(path: Path) -> str:
    """Returns the source of a notebook's first cell of code."""
    cells = nbformat.read(path, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
def test_quickstart_teaches_the_model():
    printed = run("quickstart")
    (before, rows), (after, _) = (
        tuple(map(int, numbers)) for numbers in re.findall(r"(\d+) of (\d+) right", printed)
    )
    assert before <= 0.05 * rows
    assert after >= 0.4 * rows
    same, rows = map(int, re.findall(r"(\d+) of (\d+) answers of the merged", printed)[0])
    assert same >= 0.95 * rows


@pytest.mark.slow
def test_adapters_go_to_peft_and_come_from_it():
    pytest.importorskip("peft")
    printed = run("peft_adapters")
    differences = re.findall(r"largest difference of logits (\S+)", printed)
    assert len(differences) == 3
    assert max(map(float, differences)) < 2e-3


@pytest.mark.slow
def test_a_method_of_one_s_own_learns():
    printed = run("own_method")
    losses = re.findall(r"(scaled|lora): +[\d,]+ parameters, loss (\S+) -> (\S+)", printed)
    assert [name for name, _, _ in losses] == ["scaled", "lora"]
    assert all(float(last) < float(first) for _, first, last in losses)
    (difference,) = re.findall(r"bound and merged: (\S+)", printed)
    assert float(difference) < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is the TPU's compiler"
)
def test_405b_is_planned_without_a_tpu():
    printed = run("planning_405b")
    assert "llama-3.1-405b, hybrid, on v5p:4x4x8 (128 chips)" in printed
    assert "yes: it fits" in printed
    assert re.search(r"total +\d+\.\d GiB", printed)


@each_notebook
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@each_notebook
def test_notebooks_set_up_alike(path):
    """They differ in the packages that they need besides."""
    own = re.sub(r'(packages = \[)(?:"\w+", )*', r"\1", set_up_of(path))
    assert own == set_up_of(ROOT / "examples" / "quickstart.ipynb")


class Elsewhere:
    """A runtime without the repository, on which the set-up runs."""

    def __init__(self, monkeypatch, folder: Path):
        self.commands: list[list[str]] = []
        self.killed: list[int] = []
        self._folder = folder
        monkeypatch.chdir(folder)
        monkeypatch.setattr(subprocess, "run", self._run)
        monkeypatch.setattr(os, "kill", lambda pid, number: self.killed.append(pid))
        monkeypatch.setattr(sys, "path", list(sys.path))

    def _run(self, command, **_):
        self.commands.append(command)
        if command[0] == "git":
            (self._folder / "peft_jax" / "assets" / "tiny_world").mkdir(parents=True)
            (self._folder / "peft_jax" / "setup.cfg").touch()
        return subprocess.CompletedProcess(command, 0)

    def set_up(
        self, notebook: str = "quickstart", repository: str = "https://example.org/a.git"
    ) -> dict:
        """Runs the set-up with an address to clone from, and returns its names."""
        names: dict = {}
        source = set_up_of(ROOT / "examples" / f"{notebook}.ipynb")
        assert source.count('REPOSITORY = ""') == 1
        exec(source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), names)
        return names


@pytest.mark.parametrize("accelerator", ["tpu", "gpu", "cpu"])
def test_the_set_up_installs_for_what_it_finds(accelerator, tmp_path, monkeypatch):
    devices = {"tpu": {"/dev": ["accel0"]}, "gpu": {}, "cpu": {}}[accelerator]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(devices.get(str(self), [])))
    has_driver = accelerator == "gpu"
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if has_driver else None)
    runtime = Elsewhere(monkeypatch, tmp_path)
    names = runtime.set_up()
    assert names["accelerator"] == accelerator
    clone, install = (one for one in runtime.commands if one[0] != "nvidia-smi")
    assert clone[:2] == ["git", "clone"]
    extra = "" if accelerator == "cpu" else f"[{accelerator}]"
    assert install[1:] == ["-m", "pip", "install", "-q", "-e", f"{tmp_path / 'peft_jax'}{extra}"]
    assert Path.cwd() == tmp_path / "peft_jax"
    # These tests have imported JAX, as Colab may have before the notebook begins.
    assert runtime.killed == [os.getpid()]


def test_after_the_restart_nothing_is_installed_again(tmp_path, monkeypatch):
    runtime = Elsewhere(monkeypatch, tmp_path)
    runtime.set_up("peft_adapters")
    monkeypatch.chdir(tmp_path)
    done = len(runtime.commands)
    runtime.set_up("peft_adapters")
    assert [one[0] for one in runtime.commands[done:] if one[0] != "nvidia-smi"] == []
    assert Path.cwd() == tmp_path / "peft_jax"


def test_a_missing_address_is_named(tmp_path, monkeypatch):
    runtime = Elsewhere(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY is empty"):
        runtime.set_up(repository="")
    assert not [one for one in runtime.commands if one[0] == "git"]
