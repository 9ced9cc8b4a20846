"""Tests that metrics have every step once, even after a killed process."""

import json
import resource
import sys
import threading
import types

import numpy as np
import pytest

from peft_jax.training.report.metrics import (
    HELD_OUT,
    TRAIN,
    MetricsLog,
    TensorBoard,
    WeightsAndBiases,
    read_records,
)


def _record(step, split=TRAIN, **values):
    return {"step": step, "split": split, **values}


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(_record(1, loss=np.float32(0.5), by_layer=np.array([1.0, 2.0], np.float32)))
        assert json.loads(path.read_text()) == {
            "step": 1,
            "split": "train",
            "loss": 0.5,
            "by_layer": [1.0, 2.0],
        }


def test_records_after_the_resumed_step_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(_record(0, HELD_OUT, loss=9.0))
        for step in range(1, 8):
            log.write(_record(step, loss=float(step)))
    # As a process killed in the middle of a write leaves it.
    path.write_bytes(path.read_bytes() + b'{"step": 8, "spl')
    with MetricsLog(path, from_step=5) as log:
        assert log.has(0, HELD_OUT)
        assert log.has(5, TRAIN)
        assert not log.has(6, TRAIN)
        for step in range(6, 10):
            log.write(_record(step, loss=10.0 + step))
    records = read_records(path)
    assert [(r["step"], r["split"]) for r in records] == [(0, HELD_OUT)] + [
        (step, TRAIN) for step in range(1, 10)
    ]
    assert [r["loss"] for r in records[1:]] == [1.0, 2.0, 3.0, 4.0, 5.0, 16.0, 17.0, 18.0, 19.0]


def test_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "split": "train"}\n')
    with MetricsLog(path):
        pass
    assert read_records(path) == []


def test_non_finite_values_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(_record(1, loss=float("nan"), norms=np.array([1.0, np.inf])))
    assert '"loss": null, "norms": [1.0, null]' in path.read_text()


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\nnonsense\n{"step": 3, "split": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 .*nonsense"):
        read_records(path)


@pytest.mark.parametrize("line", ['{"step": "2", "split": "train"}', '{"step": 2}', "[2]", "\0\0"])
def test_invalid_record_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "split": "train"}}\n{line}\n{{"step": 3, "split": "train"}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 "):
        MetricsLog(path, from_step=3)
    path.write_bytes(b'\xff\xfe\n{"step": 1, "split": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 "):
        read_records(path)


def test_tensorboard_reads_the_logged_values(tmp_path):
    event_file_loader = pytest.importorskip("tensorboardX.proto.event_pb2")

    sink = TensorBoard(tmp_path)
    sink.write(_record(7, loss=0.25, **{"lambda": {"layers": np.array([0.25, 0.75])}}))
    sink.close()
    (path,) = tmp_path.iterdir()
    content, offset, values = path.read_bytes(), 0, {}
    while offset < len(content):  # length, its checksum, the event, its checksum
        size = int.from_bytes(content[offset : offset + 8], "little")
        event = event_file_loader.Event.FromString(content[offset + 12 : offset + 12 + size])
        values |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
        offset += 12 + size + 4
    assert values["train/loss"] == (7, 0.25)
    assert values["train/lambda/layers"] == (7, 0.5)
    assert "train/lambda/layers/by_layer" in values


def test_full_disk_raises_an_error_while_events_are_written(tmp_path):
    threads = threading.active_count()
    sink = TensorBoard(tmp_path, from_step=4)
    assert threading.active_count() == threads
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            sink.write(_record(7, loss=0.25))
        with pytest.raises(OSError, match="File too large"):
            sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    """Uses a mock that records the calls of the real client."""
    begun, logged = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        begun.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        sink = WeightsAndBiases(project="p", name="n", config={"seed": 1}, folder=tmp_path)
    sink.write(_record(3, loss=0.5, **{"lambda": {"layers": [0.2, 0.4]}}))
    sink.close()
    assert begun[0] == begun[1]
    assert begun[0]["resume"] == "allow"
    step, values = logged[0]
    assert step == 3
    assert values["train/loss"] == 0.5
    assert abs(values["train/lambda/layers"] - 0.3) < 1e-12
    assert logged[-1] == "finished"


def test_process_that_does_not_write_knows_the_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(_record(0, HELD_OUT, loss=1.0))
    before = path.read_text()
    with MetricsLog(path, from_step=0, writes=False) as log:
        assert log.has(0, HELD_OUT)
        log.write(_record(1, loss=1.0))
        log.sync()
        assert log.has(1, TRAIN)
    assert path.read_text() == before
