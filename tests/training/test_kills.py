"""Runs that are killed at random, or whose disk fills up, end bit for bit as one that is not.

Twenty kills and five limits of a file's size, each in a process of its own:

    python -m pytest -m slow tests/training/test_kills.py
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def start(workdir, flags, *, most_bytes=None):
    """Starts a run, whose files may not grow over so many bytes."""

    def limit():
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


@pytest.fixture(scope="module")
def flags(checkpoint, data):
    return [
        "--config=configs/finetune.py:lora,precision=float32",
        f"--config.model.path={checkpoint}",
        "--config.data.recipe=alpaca",
        f"--config.data.path={data / 'words'}",
        "--config.data.prompt_template={instruction}",
        "--config.data.completion_template= {output}",
        "--config.method.dropout=0.1",
        "--config.train.steps=24",
        "--config.train.batch_size=4",
        "--config.train.max_length=16",
        "--config.checkpoint.every=3",
        "--config.evaluate.every=8",
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that nothing stops, and how long it took."""
    workdir, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    _, said = start(workdir, flags).communicate()
    assert (workdir / "summary.json").is_file(), said
    return workdir, time.monotonic() - began


def outcome(workdir):
    """What a run has computed: its adapter's bytes, and its records without the clock's."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("timing", None)
    return (workdir / "adapter" / "adapter_model.safetensors").read_bytes(), records


@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_random_ends_the_same(whole, flags, tmp_path, seed):
    reference, seconds = whole
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 3)):
        process = start(tmp_path / "run", flags)
        try:
            # The first part of a process is its imports, which there is nothing to learn from.
            process.wait(timeout=seconds * chance.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    _, said = start(tmp_path / "run", flags).communicate()
    assert "Traceback" not in said
    assert outcome(tmp_path / "run") == outcome(reference)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.99])
def test_a_run_whose_files_may_not_grow_ends_the_same_once_they_may(whole, flags, tmp_path, share):
    reference, _ = whole
    largest = max(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    process = start(tmp_path / "run", flags, most_bytes=int(largest * share))
    _, said = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "the same command resumes the run" in said.strip().splitlines()[-1]
    _, said = start(tmp_path / "run", flags).communicate()
    assert outcome(tmp_path / "run") == outcome(reference)
