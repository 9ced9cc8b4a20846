"""Tests that the code blocks of the README and of every page run in order."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import (
    DOCUMENTS,
    NOT_RUN,
    ROOT,
    RUN,
    SHOWN,
    commands_in,
    find_unknown,
    indented_blocks,
    make_folder,
    read_blocks,
    run_blocks,
)

each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
each_that_runs = pytest.mark.parametrize(
    "path",
    [
        path
        for path in DOCUMENTS
        if any(block.language in RUN and not block.reason for block in read_blocks(path))
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)


@each_document
def test_code_blocks_have_a_known_language(path: Path):
    assert indented_blocks(path) == []
    unknown = [block for block in read_blocks(path) if block.language not in (*RUN, *SHOWN)]
    assert unknown == []


@each_document
def test_every_exemption_precedes_a_block(path: Path):
    exempt = [block for block in read_blocks(path) if block.reason]
    assert len(NOT_RUN.findall(path.read_text(encoding="utf-8"))) == len(exempt)
    assert all(block.language in RUN for block in exempt)


@each_document
def test_python_blocks_compile(path: Path):
    for block in read_blocks(path):
        if block.language == "python":
            compile(block.text, f"{path.name}:{block.line}", "exec")


@pytest.mark.slow
@each_document
def test_commands_name_what_exists(path: Path):
    wrong = {
        f"{block.line}: {' '.join(words)}": found
        for block in read_blocks(path)
        if block.language == "bash"
        for words in commands_in(block.text)
        if (found := find_unknown(words))
    }
    assert wrong == {}


def test_unknown_names_are_found():
    commands = {
        "python trian.py": "no file trian.py",
        "python train.py --topologie=v5e": "no flag --topologie",
        "make tset": "no target tset",
        'pip install -e ".[tup]"': "no extra tup",
        "python -m pytest tests/no_such_test.py": "no path tests/no_such_test.py",
        "python train.py --workdir=x --config=y | head": "",
    }
    for command, expected in commands.items():
        assert find_unknown(next(commands_in(command))) == expected, command


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Returns the work directory of a short run, which pages call `runs/mine`."""
    folder = tmp_path_factory.mktemp("run")
    env = make_folder(folder)
    subprocess.run(
        [
            *(sys.executable, "train.py", "--config=configs/demo.py:lora,steps=4"),
            *("--workdir=runs/mine", "--config.data.check_rows=0"),
        ],
        cwd=folder,
        env=env,
        check=True,
        capture_output=True,
    )
    return folder / "runs" / "mine"


@pytest.mark.slow
@each_that_runs
def test_blocks_run(path: Path, tmp_path: Path, finished_run: Path):
    env = make_folder(tmp_path)
    if path.name not in ("README.md", "getting_started.md"):
        shutil.copytree(finished_run, tmp_path / "runs" / "mine")
    printed = run_blocks(path, tmp_path, env)
    if path == ROOT / "README.md":
        before, *_, after = map(float, re.findall(r"held-out loss ([\d.]+)", printed))
        assert after < 0.5 * before
        assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()
        assert "Ben" in printed
