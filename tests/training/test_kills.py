"""Tests that killed runs and runs with a full disk equal an uninterrupted run bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import reliability

ROOT = Path(__file__).parents[2]

RECORDS = [
    {"step": 0, "split": "held_out", "loss": 2.0},
    {"step": 1, "split": "train", "loss": 1.5, "timing": {"seconds": 0.1}},
]


def write_run(folder, *, weights=b"weights", tokens=7, records=RECORDS):
    """Returns a folder with the files that are compared of a finished run."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    summary = dict.fromkeys(reliability.COMPARED, 1.0) | {"tokens": tokens, "seconds": {"train": 1}}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_clock_times_may_differ(tmp_path):
    later = [RECORDS[0], {**RECORDS[1], "timing": {"seconds": 9.0}}]
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", records=later)
    assert reliability.differences(one, other) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"weights": b"weightt"}, "adapter/adapter_model.safetensors differs"),
        ({"tokens": 8}, "tokens of summary.json differs"),
        ({"records": RECORDS[:1]}, "metrics.jsonl differs"),
        ({"records": [*RECORDS, RECORDS[1]]}, "metrics.jsonl differs"),
    ],
    ids=["a bit", "a total", "a lost record", "a record twice"],
)
def test_every_other_difference_is_named(tmp_path, changed, named):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", **changed)
    assert reliability.differences(one, other) == [named]


LINE = "train.py: a: No space left on device. Once mended, the same command resumes the run\n"


@pytest.mark.parametrize(
    ("code", "said", "fault"),
    [
        (1, LINE, ""),
        (0, LINE, "exit code 0"),
        (1, f"Traceback (most recent call last)\n{LINE}", "more than one line"),
        (1, LINE * 2, "more than one line"),
        (1, "train.py: a: No space left on device\n", "does not mention resuming"),
    ],
    ids=["as it should", "finished", "traceback", "twice", "no way on"],
)
def test_full_disk_ends_in_one_line(code, said, fault):
    found = reliability.fault_of_ending(code, said)
    assert fault in found
    assert bool(found) == bool(fault)


@pytest.mark.slow
def test_killed_runs_and_full_disks_equal_an_uninterrupted_run(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.reliability"),
            *("--kills=2", "--full_disks=1", f"--output={tmp_path}"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills" in done.stdout
    assert "1 full disk" in done.stdout
