"""The notebook runs top to bottom, and the model learns in it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.skipif(
    not (ROOT / "assets" / "tiny_world" / "model.safetensors").is_file(),
    reason="assets/tiny_world is not there; configs/pretrain_tiny.py makes it",
)
def test_the_notebook_runs_and_the_model_learns():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    (before, rows), (after, _) = (
        tuple(map(int, numbers)) for numbers in re.findall(r"(\d+) of (\d+) right", printed)
    )
    assert before <= 0.05 * rows
    assert after >= 0.4 * rows
    same, rows = map(int, re.findall(r"(\d+) of (\d+) answers of the merged", printed)[0])
    assert same >= 0.95 * rows


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
