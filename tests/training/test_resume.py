"""Tests resuming: longer runs, changed inputs and missing files."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from peft_jax.data import DataSettings
from peft_jax.runtime.errors import StorageError
from peft_jax.training import RefusedError, loop, prepare, run
from peft_jax.training.input_digests import Content, Inputs, identify_data, pin
from peft_jax.training.report.metrics import MetricsLog, read_records
from peft_jax.training.resume import explain_schedule

CONSTANT = {"optimizer.schedule.name": "constant", "optimizer.schedule.warmup_steps": 2}


@pytest.fixture(scope="module")
def source(tiny, checkpoint, data, tmp_path_factory):
    """Provides a base model and data of this module, and configurations for them."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(checkpoint, folder / "base")
    shutil.copytree(data / "words", folder / "words")

    def config(steps=4, **changes):
        paths = {"model.path": str(folder / "base"), "data.path": str(folder / "words")}
        return tiny(**{**paths, **CONSTANT, "train.steps": steps, **changes})

    return SimpleNamespace(folder=folder, config=config)


@pytest.fixture(scope="module")
def ended(source, tmp_path_factory):
    """Returns a finished run of four steps."""
    workdir = tmp_path_factory.mktemp("ended") / "run"
    run(source.config(), workdir)
    return workdir


@pytest.fixture
def workdir(ended, tmp_path):
    """Returns a copy of the finished run."""
    shutil.copytree(ended, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def started(monkeypatch):
    """Records the starts of runs, which then do nothing."""
    starts = []

    def go(self, start):
        starts.append(start)
        return {}

    monkeypatch.setattr(loop.TrainingLoop, "go", go)
    return starts


def adapter_bytes(workdir):
    return (workdir / "adapter" / "adapter_model.safetensors").read_bytes()


def change_weights(base):
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = (np.frombuffer(content[-4:], "<f4") * 0.5).tobytes()
    file.write_bytes(content)


def change_rows(words):
    file = words / "train.jsonl"
    file.write_text(file.read_text().replace("w3", "w4"))


def add_a_row(words):
    file = words / "train.jsonl"
    first, *_ = file.read_text().splitlines()
    file.write_text(file.read_text() + first + "\n")


@pytest.fixture
def restored(source, tmp_path):
    """Restores base model and data."""
    shutil.copytree(source.folder, tmp_path / "before")
    yield
    shutil.rmtree(source.folder)
    shutil.copytree(tmp_path / "before", source.folder)


def test_extended_run_equals_an_uninterrupted_one(source, workdir, tmp_path, listener):
    run(source.config(6), workdir, reporter=listener)
    assert "resuming from step 4 of 6" in listener.text
    assert "an uninterrupted run of 6 steps" in listener.text
    summary = run(source.config(6), tmp_path / "whole")
    assert summary["steps"] == 6
    assert adapter_bytes(workdir) == adapter_bytes(tmp_path / "whole")
    trained = [
        {name: value for name, value in record.items() if name != "timing"}
        for folder in (workdir, tmp_path / "whole")
        for record in read_records(folder / "metrics.jsonl")
        if record["split"] == "train"
    ]
    assert trained[:6] == trained[6:]
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 6


def test_finished_run_is_not_resumed_without_more_steps(source, workdir, started, listener):
    run(source.config(), workdir, reporter=listener)
    assert "this run is finished" in listener.text
    assert not started


def test_fewer_steps_than_taken_are_rejected(source, workdir):
    with pytest.raises(RefusedError, match=r"train\.steps gives 3 steps, .* taken 4"):
        run(source.config(3), workdir)
    assert (workdir / "summary.json").is_file()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_change_of_the_schedule_is_reported(source, name):
    config = source.config(8, **{"optimizer.schedule.name": name})
    said = explain_schedule(config.optimizer, before=4, steps=8, done=4)
    assert f"the {name} schedule now spans 8 steps" in said
    assert "in step 4 to" in said


@pytest.mark.fast("change_weights*")
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("change", "part", "name"),
    [
        (change_weights, "base", "model.safetensors has changed"),
        (change_rows, "data", "train.jsonl has changed"),
        (add_a_row, "data", "train.jsonl has changed"),
    ],
)
def test_changed_base_and_data_are_rejected_by_name(
    source, workdir, started, listener, change, part, name
):
    change(source.folder / ("base" if part == "base" else "words"))
    with pytest.raises(RefusedError) as refused:
        run(source.config(6), workdir)
    first, *_ = str(refused.value).splitlines()
    assert f"the {part} has changed since the run began: {name}" in first
    assert f"--allow_changed={part}" in str(refused.value)
    other = "data" if part == "base" else "base"
    with pytest.raises(RefusedError):
        run(source.config(6), workdir, allow_changed=[other])
    assert not started
    run(source.config(6), workdir, allow_changed=[part], reporter=listener)
    assert [start.step for start in started] == [4]
    assert ("rows are read from the first one" in listener.text) == (change is add_a_row)
    # The run is now identified by the changed inputs.
    run(source.config(6), workdir)


def test_unknown_allowed_change_is_rejected(source, tmp_path):
    with pytest.raises(RefusedError, match=r"--allow_changed .*'bsae'.*'base'"):
        run(source.config(), tmp_path / "run", allow_changed=["bsae"])


def test_inputs_are_recorded_by_content(source, ended):
    recorded = json.loads((ended / "inputs.json").read_text())
    file = source.folder / "words" / "train.jsonl"
    expected = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert recorded["data"]["files"]["train.jsonl"] == expected
    assert set(recorded["data"]["files"]) == {"train.jsonl", "validation.jsonl"}
    assert "model.safetensors" in recorded["base"]["files"]


@pytest.mark.usefixtures("started")
def test_record_of_the_inputs_is_restored_from_the_checkpoint(source, workdir, listener):
    before = (workdir / "inputs.json").read_text()
    (workdir / "inputs.json").write_text(before[:40])
    run(source.config(6), workdir, reporter=listener)
    assert "inputs.json cannot be read" in listener.text
    assert (workdir / "inputs.json").read_text() == before


@pytest.mark.usefixtures("started")
def test_a_work_directory_of_0_1_is_resumed_with_one_warning(source, workdir, listener):
    from test_loop import forget

    (workdir / "inputs.json").unlink()
    forget(workdir / "checkpoints" / "4", "inputs", "steps", "records", "held_out")
    config = json.loads((workdir / "config.json").read_text())
    del config["data"]["packing_window"], config["method"]["init_passes"]  # not there yet
    (workdir / "config.json").write_text(json.dumps(config))
    run(source.config(4, **{"checkpoint.keep": 4}), workdir, reporter=listener)
    (workdir / "summary.json").unlink()
    run(source.config(), workdir, reporter=listener)
    assert len([line for line in listener.said if "as version 0.1" in line]) == 1
    run(source.config(), workdir, reporter=listener)
    assert len([line for line in listener.said if "as version 0.1" in line]) == 1


def test_hub_inputs_are_loaded_at_their_commit(source, monkeypatch, tmp_path):
    commits = {"model.revision": "", "data.revision": ""}
    config = source.config(**commits)
    before = Inputs(
        base=Content(commits={"org/model": "a" * 40}), data=Content(commits={"org/rows": "b" * 40})
    )
    pinned = pin(config, before, ())
    assert (pinned.model.revision, pinned.data.revision) == ("a" * 40, "b" * 40)
    assert pin(config, before, ("base", "data")) == config
    asked = []

    def find_folder(path, *, revision):
        asked.append(revision)
        raise ValueError("not here")

    monkeypatch.setattr(prepare, "find_folder", find_folder)
    with pytest.raises(RefusedError, match="not here"):
        prepare.prepare(config, say=print, pinned=pinned)
    assert asked == ["a" * 40]


def test_hub_commit_of_prepared_rows_is_in_their_path(tmp_path):
    folder = tmp_path / "openai___gsm8k" / "main" / "0.0.0" / ("c" * 40)
    found = identify_data([folder / "gsm8k-train.arrow"], DataSettings(recipe="gsm8k"))
    assert found == Content(commits={"openai/gsm8k": "c" * 40})
    moved = Content(commits={"openai/gsm8k": "d" * 40})
    assert found.changes(moved) == [f"openai/gsm8k is at commit {'d' * 40}, but was at {'c' * 40}"]


def test_missing_results_are_written_again(source, workdir, listener):
    before, summary = adapter_bytes(workdir), json.loads((workdir / "summary.json").read_text())
    shutil.rmtree(workdir / "adapter")
    (workdir / "metrics.jsonl").unlink()
    for left in (".summary.77.tmp.json", ".config.8.tmp.json"):
        (workdir / left).write_text("{")
    (workdir / ".adapter.77.tmp").mkdir()
    again = run(source.config(), workdir, reporter=listener)
    assert f"written again from the last checkpoint: {workdir / 'adapter'}" in listener.text
    assert ".adapter.77.tmp, .config.8.tmp.json, .summary.77.tmp.json" in listener.text
    assert "has lost 6 of the records up to step 4" in listener.text
    assert adapter_bytes(workdir) == before
    assert again["before"] == summary["before"]
    assert again["after"] == summary["after"]
    assert not [path.name for path in workdir.glob(".*") if path.name != ".lock"]


def test_truncated_summary_is_written_again(source, workdir, started, listener):
    text = (workdir / "summary.json").read_text()
    (workdir / "summary.json").write_text(text[: len(text) // 2])
    run(source.config(), workdir, reporter=listener)
    assert "summary.json cannot be read" in listener.text
    assert [start.step for start in started] == [4]


def test_moved_adapter_is_restored(source, workdir, started, listener):
    (workdir / "adapter").rename(workdir / ".adapter.5.old")
    run(source.config(), workdir, reporter=listener)
    assert "adapter from .adapter.5.old" in listener.text
    assert (workdir / "adapter" / "adapter_config.json").is_file()
    assert started


@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("has_summary", [True, False])
def test_results_without_a_checkpoint_are_not_overwritten(source, workdir, steps, has_summary):
    shutil.rmtree(workdir / "checkpoints")
    if has_summary and steps == 4:
        shutil.rmtree(workdir / "report")
    elif not has_summary:
        (workdir / "summary.json").unlink()
    before = adapter_bytes(workdir)
    with pytest.raises(RefusedError, match=r"no checkpoint to resume from"):
        run(source.config(steps), workdir)
    assert adapter_bytes(workdir) == before


def test_run_without_a_checkpoint_starts_again_with_a_warning(source, workdir, started, listener):
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(workdir / name)
    (workdir / "summary.json").unlink()
    run(source.config(), workdir, reporter=listener)
    assert "no usable checkpoint" in listener.text
    assert [start.step for start in started] == [0]


def test_foreign_file_among_the_results_is_rejected_before_training(source, workdir, monkeypatch):
    monkeypatch.setattr(loop, "prepare", None)
    shutil.rmtree(workdir / "adapter")
    (workdir / "adapter").mkdir()
    (workdir / "adapter" / "notes.txt").touch()
    with pytest.raises(RefusedError, match=r"adapter .*notes\.txt"):
        run(source.config(6), workdir)
    shutil.rmtree(workdir / "adapter")
    (workdir / "adapter").touch()
    with pytest.raises(RefusedError, match="adapter is a file"):
        run(source.config(6), workdir)


def test_full_disk_is_reported_in_one_line(source, tmp_path, monkeypatch):
    def full(log, record):
        if record["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "metrics.jsonl"))
        real(log, record)

    real = MetricsLog.write
    monkeypatch.setattr(MetricsLog, "write", full)
    workdir = tmp_path / "run"
    with pytest.raises(StorageError) as stopped:
        run(source.config(), workdir)
    message = str(stopped.value)
    assert message.startswith(f"{tmp_path / 'metrics.jsonl'}: No space left on device")
    assert f"the last checkpoint is {Path(workdir, 'checkpoints', '2')}" in message
    assert "\n" not in message
