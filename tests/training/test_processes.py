"""Tests multi-process runs over gloo: they agree with one process, and end together."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from peft_jax.runtime import processes
from peft_jax.runtime.errors import ExitCode, RefusedError
from peft_jax.runtime.processes import PeerMonitor, ProcessSettings
from peft_jax.training import placement
from peft_jax.training.report.metrics import read_records

ROOT = Path(__file__).parents[2]
SECONDS = 300


class Processes:
    """Runs `train.py` in several processes, as on the hosts of a pod."""

    def __init__(
        self,
        flags: Sequence[str],
        count: int,
        devices: int,
        of_the_last: Sequence[str] = (),
        preempted_after: int | None = None,
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
        }
        if preempted_after is not None:
            environment |= {
                "PREEMPTED_AFTER": str(preempted_after),
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
            }
            flags = [*flags, "--import=preempted"]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, str(ROOT / "train.py"), *flags, f"--process_id={index}"),
                    *(of_the_last if index == count - 1 else ()),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=ROOT,
            )
            for index in range(count)
        ]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def finish(self) -> list[tuple[int, str, str]]:
        """The exit code of each, and what it said."""
        said = [process.communicate(timeout=SECONDS) for process in self.processes]
        return [
            (process.returncode, *texts)
            for process, texts in zip(self.processes, said, strict=True)
        ]

    def wait_for(self, metrics: Path, step: int) -> None:
        """Returns once the metrics have a step."""
        deadline = time.monotonic() + SECONDS
        while not any(record["step"] >= step for record in read_records(metrics)):
            if any(process.poll() is not None for process in self.processes):
                pytest.fail(f"the run ended by itself: {self.finish()}")
            assert time.monotonic() < deadline, "the run does not come that far"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def flags(checkpoint, data):
    """Returns the flags of a short run with gradient initialization and accumulation."""

    def make(workdir: Path, steps: int = 4, **changes: object) -> list[str]:
        settings = {
            "model.path": checkpoint,
            "data.recipe": "alpaca",
            "data.path": data / "words",
            "data.prompt_template": "{instruction}",
            "data.completion_template": " {output}",
            "method.target_modules": "q_proj,down_proj",
            "method.rank": 2,
            "method.block_size": 4,
            "method.init_batches": 3,
            "train.steps": steps,
            "train.batch_size": 8,
            "train.gradient_accumulation": 2,
            "train.max_length": 16,
            "train.learning_rate": 0.01,
            "checkpoint.every": 2,
            "parallel.fsdp": 2,
            "logging.tensorboard": False,
        } | {name.replace("__", "."): value for name, value in changes.items()}
        config = "--config=configs/finetune.py:hybrid,precision=float32"
        return [
            config,
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in settings.items() if value is not None),
        ]

    return make


def losses(workdir: Path) -> dict[tuple[str, int], float]:
    return {(r["split"], r["step"]): r["loss"] for r in read_records(workdir / "metrics.jsonl")}


def assert_same_losses(one: Path, other: Path) -> None:
    first, second = losses(one), losses(other)
    assert first.keys() == second.keys()
    for where, loss in first.items():
        assert second[where] == pytest.approx(loss, rel=2e-5), where


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """Returns the same run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    with Processes(flags(workdir), 1, devices=4) as one:
        ((code, _, said),) = one.finish()
    assert code == 0, said
    return workdir


@pytest.mark.slow
def test_two_processes_agree_with_one(flags, alone, tmp_path):
    with Processes(flags(tmp_path / "run"), 2, devices=2) as both:
        ended = both.finish()
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same_losses(alone, tmp_path / "run")
    # One speaks, and what is written is written once.
    assert "held-out loss" in ended[0][2]
    assert "held-out loss" not in ended[1][2]
    steps = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(steps) == ["0", "2", "4"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens"] == json.loads((alone / "summary.json").read_text())["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{"parallel.fsdp": 4}, {"parallel.fsdp": 1, "parallel.tensor": 2}],
    ids=lambda mesh: ",".join(mesh),
)
def test_four_processes_agree_with_one(flags, alone, tmp_path, mesh):
    """A tensor axis over two processes gives them the same rows."""
    with Processes(flags(tmp_path / "run", **mesh), 4, devices=1) as all_four:
        ended = all_four.finish()
    assert [code for code, _, _ in ended] == [0] * 4, ended
    assert_same_losses(alone, tmp_path / "run")


@pytest.mark.slow
def test_classification_metrics_agree_with_one_process(flags, data, tmp_path):
    changes = {
        "data.recipe": "sst2",
        "data.path": data / "sentiment",
        "data.prompt_template": None,
        "data.completion_template": None,
        "method.init_batches": 1,
    }
    summaries = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        with Processes(flags(workdir, steps=2, **changes), count, devices=2 // count) as both:
            ended = both.finish()
        assert [code for code, _, _ in ended] == [0] * count, ended
        summaries.append(json.loads((workdir / "summary.json").read_text()))
    assert "accuracy" in summaries[0]["after"]
    assert summaries[0]["after"]["accuracy"] == summaries[1]["after"]["accuracy"]
    assert summaries[0]["loss_after"] == pytest.approx(summaries[1]["loss_after"], rel=2e-5)


@pytest.mark.slow
def test_encoder_metrics_agree_with_one_process(flags, encoder, similar, tmp_path):
    """Answers keep the order of rows with several microbatches in any number of processes."""
    changes = {
        "model.path": encoder,
        "data.recipe": "stsb",
        "data.path": similar,
        "data.prompt_template": None,
        "data.completion_template": None,
        "method.target_modules": "all-linear",
        "train.max_length": 12,
        "parallel.fsdp": 1,
    }
    measured = []
    for count in (1, 2, 4):
        workdir = tmp_path / str(count)
        given = flags(workdir, steps=2, **changes)
        with Processes(given, count, devices=4 // count) as all_of_them:
            ended = all_of_them.finish()
        assert [code for code, _, _ in ended] == [0] * count, ended
        measured.append(json.loads((workdir / "summary.json").read_text())["after"])
    for other in measured[1:]:
        for name in ("loss", "pearson", "spearman"):
            assert other[name] == pytest.approx(measured[0][name], abs=2e-4), name


@pytest.mark.slow
def test_preempted_run_resumes_with_any_number_of_processes(flags, tmp_path):
    """A notice to one host stops all at one step; the run uses 2, 1 and then 4 processes."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    steps = 40
    with Processes(flags(straight, steps), 1, devices=4) as one:
        assert one.finish()[0][0] == 0
    for count, mesh, step in ((2, {}, 3), (1, {"parallel.fsdp": 4}, 12)):
        given = flags(broken, steps, **{"checkpoint.every": 0, **mesh})
        with Processes(given, count, devices=4 // count, preempted_after=step) as some:
            ended = some.finish()
        assert [code for code, _, _ in ended] == [143] * count, ended
        assert "stopped by a signal after step" in ended[0][2]
    with Processes(flags(broken, steps, **{"parallel.tensor": 2}), 4, devices=1) as four:
        ended = four.finish()
    assert [code for code, _, _ in ended] == [0] * 4, ended
    assert "resuming from step" in ended[0][2]
    assert_same_losses(straight, broken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_process_ends_the_others_and_the_run_resumes(flags, tmp_path, number, lost):
    """Covers a host that dies and one that hangs, the coordinator and another."""
    workdir = tmp_path / "run"
    given = flags(workdir, 5000)
    with Processes([*given, "--contact_timeout=20"], 2, devices=1) as both:
        both.wait_for(workdir / "metrics.jsonl", 3)
        both.processes[lost].send_signal(number)
        began = time.monotonic()
        survivor = both.processes[1 - lost]
        _, said = survivor.communicate(timeout=SECONDS)
        seconds = time.monotonic() - began
    assert survivor.returncode not in (0, None)
    assert seconds < 200, said
    if number == signal.SIGKILL and lost == 0:
        # Without its coordinator JAX ends a process at once, with a message of its own.
        assert "leader task was preempted/died/restarted unexpectedly" in said, said
    else:
        assert f"lost contact with process {lost} of 2" in said, said
        assert survivor.returncode == ExitCode.LOST_CONTACT
    with Processes(flags(workdir, 5000), 2, devices=1) as again:
        again.wait_for(workdir / "metrics.jsonl", 5)
        again.processes[0].send_signal(signal.SIGTERM)
        ended = again.finish()
    assert [code for code, _, _ in ended] == [143, 143], ended
    assert "resuming from step" in ended[0][2]


@pytest.mark.slow
def test_rejected_process_ends_the_others(flags, tmp_path):
    wrong = ["--config.train.stesp=3"]
    with Processes(flags(tmp_path / "run"), 2, devices=1, of_the_last=wrong) as both:
        ended = both.finish()
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "process 1 of 2" in ended[0][2]
    assert "train.stesp is not a setting" in ended[0][2]
    assert "train.stesp is not a setting" in ended[1][2]


@pytest.mark.slow
def test_processes_with_different_settings_are_rejected(flags, tmp_path):
    other = ["--config.train.learning_rate=0.02"]
    with Processes(flags(tmp_path / "run"), 2, devices=1, of_the_last=other) as both:
        ended = both.finish()
    assert [code for code, _, _ in ended] == [2, 2], ended
    for _, _, said in ended:
        assert "train.learning_rate: 0.01 in process 0; 0.02 in process 1" in said
    assert not (tmp_path / "run" / "config.json").exists()


def test_different_settings_are_named_with_their_processes():
    one = {"train": {"steps": 4, "seed": 0}, "model": {"path": "m"}}
    other = {"train": {"steps": 5, "seed": 0}, "model": {"path": "m"}}
    placement._check_same([one, one])
    with pytest.raises(RefusedError, match="the same settings") as refusal:
        placement._check_same([one, other, one])
    named = [line for line in str(refusal.value).splitlines() if line.startswith("  ")]
    assert named == ["  train.steps: 4 in process 0, 2; 5 in process 1"]


# The watch by itself.


class Store:
    """Mock of the coordinator's store, shared by the processes of a test."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.broken = False

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.kept
        self._check()
        self.kept[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        self._check()
        return [(key, value) for key, value in self.kept.items() if key.startswith(prefix)]

    def _check(self) -> None:
        if self.broken:
            raise RuntimeError("UNAVAILABLE: failed to connect to all addresses")


@pytest.fixture
def in_a_hurry(monkeypatch):
    """Shortens the wait for other processes to read why one ends."""
    monkeypatch.setattr(processes, "_FAREWELL_SECONDS", 0.2)


class Watched(PeerMonitor):
    """Monitor whose process records its exit code instead of ending."""

    def __init__(self, store: Store, index: int, timeout: float = 2.0):
        self.said: list[str] = []
        self.codes: list[int] = []
        super().__init__(
            store,
            count=2,
            index=index,
            timeout=timeout,
            say=self.said.append,
            end=self.codes.append,
        )

    def wait(self) -> None:
        self._thread.join(100)
        assert not self._thread.is_alive()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_silent_process_is_named():
    store = Store()
    one, other = Watched(store, 0), Watched(store, 1)
    time.sleep(3.0)
    assert one.codes == other.codes == []
    other.closing()
    one.wait()
    assert one.codes == [ExitCode.LOST_CONTACT]
    assert f"lost contact with process 1 of 2, on {socket.gethostname()}" in one.said[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_silent_coordinator_is_named():
    store = Store()
    other = Watched(store, 1)
    store.broken = True
    other.wait()
    assert other.codes == [ExitCode.LOST_CONTACT]
    assert "UNAVAILABLE" in other.said[0]
    assert "lost contact with process 0 of 2, the coordinator" in other.said[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_reason_of_an_ending_process_reaches_the_others():
    store = Store()
    one, other = Watched(store, 0), Watched(store, 1)
    with pytest.raises(SystemExit):
        other.leave("there is no such data", 2)
    one.wait()
    assert (one.codes, other.codes) == ([2], [2])
    assert one.said == [f"process 1 of 2, on {socket.gethostname()}, ended: there is no such data"]


@pytest.mark.fast("ValueError")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "broken_off",
    [
        jax.errors.JaxRuntimeError("INTERNAL: Gloo AllReduce failed"),
        # As it comes if the other is gone before the computation has begun.
        ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_aborted_computation_names_the_lost_process(in_a_hurry, broken_off, capsys):
    store = Store()
    one, other = Watched(store, 0), Watched(store, 1)
    other.closing()
    with pytest.raises(SystemExit):
        one.fail(broken_off)
    assert one.codes[0] == ExitCode.LOST_CONTACT
    assert "lost contact with process 1 of 2" in one.said[0]
    assert "Gloo" not in capsys.readouterr().err


def test_bug_ends_the_process_at_once(in_a_hurry, capsys):
    one = Watched(Store(), 0, timeout=60.0)
    with pytest.raises(SystemExit):
        one.fail(ValueError("there are 3 rows for 2 devices"))
    assert one.codes == [1]
    assert "ValueError: there are 3 rows for 2 devices" in capsys.readouterr().err


def test_finished_process_does_not_report_others_as_lost():
    store = Store()
    one = Watched(store, 0)
    one.closing()
    store.broken = True
    one.wait()
    assert one.codes == one.said == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "here"}, "coordinator .*'here'"),
        ({"coordinator": ":1"}, "coordinator .*':1'"),
        ({"coordinator": "here:²"}, "coordinator .*'here:²'"),
        ({"coordinator": "here:99999"}, "'here:99999'.* 65535"),
        ({"count": 0}, "num_processes .* 0"),
        ({"count": 2, "index": 2}, "process_id .* 2 of 2"),
        ({"contact_timeout": 1}, "contact_timeout .*1"),
    ],
)
def test_invalid_settings_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        ProcessSettings.from_environment({}, **given)


def test_waiting_process_says_so_and_names_missing_flags(monkeypatch):
    """No other process connects, and no coordinator is given."""
    monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 0.1)
    said: list[str] = []
    heard = threading.Event()

    def say(message: str) -> None:
        said.append(message)
        heard.set()

    def initialize(**_: object) -> None:
        assert heard.wait(60)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(RefusedError, match=": --coordinator must be given"):
        processes.join_processes(ProcessSettings(count=2, index=0), say=say)
    assert len(said) == 1
    assert said[0].startswith("process 0 of 2 is waiting")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70, "..", "[::1"])
def test_unresolvable_coordinator_is_rejected(monkeypatch, host):
    monkeypatch.setattr(processes, "_RESOLVE_SECONDS", 0.0)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("too late"))
    settings = ProcessSettings(coordinator=f"{host}:1234", count=2, index=1)
    with pytest.raises(RefusedError, match=r"host '.*--coordinator=HOST:PORT"):
        processes.join_processes(settings, say=pytest.fail)


def test_settings_are_read_from_the_environment():
    variables = {
        "JAX_COORDINATOR_ADDRESS": "first:1234",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "1",
    }
    found = ProcessSettings.from_environment(variables, index=3)
    assert (found.coordinator, found.count, found.index) == ("first:1234", 4, 3)
    with pytest.raises(ValueError, match=r"JAX_PROCESS_ID .*'one'"):
        ProcessSettings.from_environment(variables | {"JAX_PROCESS_ID": "one"})


def test_each_row_of_a_batch_is_on_one_device():
    from peft_jax.data import Batch
    from peft_jax.parallel import MeshSettings, batch_sharding, make_mesh
    from peft_jax.training.placement import RowPlacement

    mesh = make_mesh(MeshSettings(data=2, fsdp=4))
    rows = batch_sharding(mesh)
    placement = RowPlacement(
        rows=rows, microbatches=jax.NamedSharding(mesh, jax.P(None, *rows.spec))
    )
    tokens = np.arange(32, dtype=np.int32)[:, None] * np.ones((1, 3), np.int32)
    placed = placement.put_microbatches(Batch(tokens, tokens, tokens, tokens, tokens), 2)
    parts = [np.asarray(shard.data)[..., 0] for shard in placed.tokens.addressable_shards]
    assert all(part.shape == (2, 2) for part in parts)
    for one, other in itertools.combinations(parts, 2):
        assert not set(one.ravel()) & set(other.ravel())
    assert set(np.concatenate([part.ravel() for part in parts])) == set(range(32))
    # Microbatches are consecutive rows, whatever the number of processes.
    np.testing.assert_array_equal(placed.tokens.reshape(32, 3), tokens)
