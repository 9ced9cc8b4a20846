"""Tests the command line of training: one message and exit code 2 for invalid requests."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_jax.commands import train as train_command

ROOT = Path(__file__).parents[2]


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *flags]


def environment() -> dict[str, str]:
    """Returns the environment of a user's machine with one device and few threads."""
    return {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def train(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*flags), capture_output=True, text=True, check=False, env=environment(), cwd=ROOT
    )


@pytest.fixture(scope="module")
def flags(checkpoint, data):
    """Returns the flags of a run that is too long to finish before it is stopped."""
    return [
        "--config=configs/finetune.py:hybrid,precision=float32",
        f"--config.model.path={checkpoint}",
        "--config.data.recipe=alpaca",
        f"--config.data.path={data / 'words'}",
        "--config.data.prompt_template={instruction}",
        "--config.data.completion_template= {output}",
        "--config.method.target_modules=q_proj,down_proj",
        "--config.method.rank=2",
        "--config.method.block_size=4",
        "--config.method.dropout=0.1",
        "--config.train.steps=60",
        "--config.train.batch_size=4",
        "--config.train.max_length=16",
        "--config.checkpoint.every=7",
        "--config.evaluate.every=20",
        "--config.logging.tensorboard=False",
    ]


REFUSED = [
    (["--config=nowhere.py"], "there is no configuration file nowhere.py"),
    (["--config=configs/finetune.py:loar"], "there is no method 'loar'; did you mean 'lora'"),
    (["--config.train.stesp=3"], "train.stesp is not a setting; did you mean 'steps'"),
    (["--config.trian.steps=3"], "trian"),
    (["--config.train.lr=3"], "train.lr is not a setting; did you mean train.learning_rate?"),
    (["--config.lora_r=3"], "lora_r is not a setting; did you mean method.rank?"),
    (["--lr=3"], "there is no flag --lr; did you mean --config.train.learning_rate?"),
    (["--config.train.steps=many"], "train.steps must be an integer; it is 'many'"),
    (["--config.train.epochs=2"], "train.steps is 60 and train.epochs is 2; give one of the two"),
    (["--confg=x"], "there is no flag --confg; did you mean --config?"),
    (["--config.method.target_modules=qproj"], "did you mean 'q_proj'"),
    (["--json", "--topology=v5p:4x4x8"], "--topology and --json need --plan"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[" ".join(w) for w, _ in REFUSED])
def test_invalid_flags_are_rejected_with_one_message(
    flags, tmp_path, monkeypatch, capsys, wrong, message
):
    given = flags[1:] if wrong[0].startswith("--config=") else flags
    begin, end = (wrong, []) if wrong[0].startswith("--config=") else ([], wrong)
    monkeypatch.chdir(ROOT)
    one_device = "--config.parallel.devices=1"
    code = call_train(*begin, *given, *end, one_device, f"--workdir={tmp_path / 'run'}")
    said = capsys.readouterr().err
    assert code == 2, said
    assert message in said
    assert said.startswith("train.py: ")
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def call_train(*flags: str) -> int:
    """Returns the exit code of the command, which runs in this process."""
    try:
        return train_command.main(flags)
    except SystemExit as end:
        return int(end.code or 0)


def test_file_without_a_configuration_is_rejected():
    """As a process: in one, a file's module stays loaded under the name of the file before."""
    result = train("--config=/dev/null")
    assert result.returncode == 2
    assert "--config=/dev/null has no get_config()" in result.stderr


def test_url_that_is_not_a_bucket_is_rejected(flags):
    """As a process: what the others check in this one ends a program in the same way."""
    result = train(*flags, "--workdir=http://localhost:1/runs/first")
    assert result.returncode == 2
    assert "--workdir is http://localhost:1/runs/first" in result.stderr
    assert "give gs://bucket/folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (ROOT / "http:").exists()


def wait_for(path: Path, step: int, process: subprocess.Popen) -> None:
    """Waits until the metrics have a step, or fails with the process's output."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the run ended by itself:\n{process.communicate()[1]}")
        if path.is_file() and f'"step": {step}, "split": "train"' in path.read_text():
            return
        time.sleep(0.002)
    pytest.fail(f"step {step} was not reached")


def untimed(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]


@pytest.mark.slow
def test_stopped_and_killed_run_equals_an_uninterrupted_one(flags, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(*flags, f"--workdir={whole}")
    assert result.returncode == 0, result.stderr

    for step, number, code in ((12, signal.SIGTERM, 143), (26, signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            command(*flags, f"--workdir={broken}"),
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        wait_for(broken / "metrics.jsonl", step, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
        assert process.returncode == code, said
        assert not (broken / "summary.json").exists()
    steps = sorted(int(p.name) for p in (broken / "checkpoints").iterdir() if p.name.isdigit())
    shutil.rmtree(broken / "checkpoints" / str(steps[-1]) / "arrays" / "d")

    result = train(*flags, f"--workdir={broken}")
    assert result.returncode == 0, result.stderr
    assert f"resuming from step {steps[-2]} of 60" in result.stderr
    assert "damaged" in result.stderr
    for name in ("peft_jax_adapter.safetensors", "peft_jax_adapter.json"):
        assert (broken / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert untimed(broken) == untimed(whole)


def test_help_names_the_flags():
    result = train("--help")
    assert "--workdir" in result.stdout
    assert "--config" in result.stdout


_ENDS_TOGETHER = """
from peft_jax.commands.train import ending_together
from peft_jax.runtime import exits
class Peers:
    def leave(self, reason, code):
        raise SystemExit(f"the others are told {code}")
def broken(message, *, name):
    raise BrokenPipeError
exits.say = broken
with ending_together(Peers()):
    raise BrokenPipeError
"""


def test_error_reaches_other_processes_without_a_reader_of_stderr():
    ended = subprocess.run(
        [sys.executable, "-c", _ENDS_TOGETHER],
        capture_output=True,
        text=True,
        check=False,
        env=environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.stderr.strip() == "the others are told 141"
