"""Runs benchmarks on the small checkpoint in assets/, as their commands do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    file.stem for file in (ROOT / "benchmarks").glob("*.py") if "Arguments(" in file.read_text()
)


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_explains_its_flags(name):
    said = run(f"benchmarks.{name}", "--help")
    assert f"python -m benchmarks.{name}" in said
    assert "--output" in said or name == "hybrid_traffic"


@pytest.mark.slow
def test_starts_of_lora_ga_are_trained_from(tmp_path, shared_data):
    """The loss must fall: a schedule that was not set would leave it where it starts."""
    flags = (
        "--seeds=1",
        "--batch_size=8",
        "--skip_costs",
        "--starts",
        "one",
        "--rate=5e-3",
        f"--output={tmp_path}",
    )
    losses = {}
    for steps in (2, 12):
        run(
            "benchmarks.starts",
            f"--model={ROOT / 'assets' / 'tiny_world'}",
            f"--data={shared_data / 'gsm8k'}",
            f"--steps={steps}",
            *flags,
        )
        (file,) = tmp_path.glob("starts-*.json")
        losses[steps] = json.loads(file.read_text())["losses"][0]["one"]
    assert losses[12] < losses[2] - 0.5
