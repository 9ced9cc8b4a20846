"""Tests that wrong command lines give one message, exit code 2, and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = "assets/tiny_world"
TRAIN = [
    "train.py",
    "--config=configs/finetune.py:lora",
    f"--config.model.path={TINY}",
    "--config.data.recipe=alpaca",
    "--config.data.path=nowhere.jsonl",
]
PLAN = ["train.py", "--config=configs/hybrid_7b.py", "--plan"]
GENERATE = ["-m", "peft_jax.generation", f"--model={TINY}"]
EVALUATE = ["-m", "eval", f"--model={TINY}", "--data=assets"]

LINES = [
    ([*TRAIN], "nowhere.jsonl"),
    ([*TRAIN, "--workdir=/dev/null/run"], "/dev/null"),
    ([*TRAIN, "--workdir=ftp://host/run"], "ftp://host/run"),
    ([*TRAIN, "--workdir=gs://not a bucket/run"], "gs://not a bucket/run"),
    ([*TRAIN, "--config.train.lr=1"], "train.learning_rate"),
    ([*TRAIN, "--config.train.steps=0"], "steps"),
    ([*TRAIN, "--config.train.learning_rate=nan"], "learning_rate"),
    ([*TRAIN, "--config.method.rank=-1"], "rank"),
    ([*TRAIN, "--config.method.rank=1000000"], "rank"),
    ([*TRAIN, "--config.method.target_modules=(a+)+$"], "(a+)+$"),
    ([*TRAIN, "--config.model.path=/etc/passwd"], "/etc/passwd"),
    ([*TRAIN, "--config.model.path=http://localhost:1/x"], "http://localhost:1/x"),
    ([*TRAIN, "--config.data.recipe=alpca"], "alpaca"),
    ([*TRAIN, "--config.data.chat_template=/nowhere"], "/nowhere"),
    ([*TRAIN, "--config.parallel.tensor=7"], "tensor=7"),
    ([*TRAIN, "--coordinator=here", "--num_processes=2"], "host:port"),
    ([*TRAIN, "--num_processes=0"], "num_processes must be at least 1"),
    ([*TRAIN, "stray"], "'stray' is not a flag"),
    (["train.py"], "--config is missing"),
    (["train.py", "--config=/dev/null"], "/dev/null"),
    ([*PLAN, "--topology=v5e:0x0"], "v5e:0x0"),
    ([*PLAN, "--topology=v5p:1x1x1x1"], "v5p:1x1x1x1"),
    ([*PLAN, "--topology=\x1b[2J"], "\\x1b[2J"),
    ([*GENERATE, "--prompt=x", "--top_p=7"], "top_p"),
    ([*GENERATE, "--prompt=x", "--batch_size=0"], "batch_size"),
    ([*GENERATE, "--prompt=x", "--adapter=/nowhere"], "/nowhere"),
    ([*GENERATE], "there is no prompt"),
    (["-m", "peft_jax.convert", TINY, "http://localhost:1/x"], "http://localhost:1/x"),
    (["-m", "peft_jax.convert", TINY, "/dev/null/x"], "/dev/null"),
    ([*EVALUATE, "--tasks=gsm8"], "gsm8k"),
    ([*EVALUATE, "--tasks=nothing"], "there is no task 'nothing'"),
    (["-m", "eval.study", "--config=/nowhere.py"], "/nowhere.py"),
    (["-m", "eval.study", "--config=configs/study_cpu.py", "--only=("], "--only"),
    (["-m", "eval.metamath", "--config=metamath.py:lroa", "--workdir=/nowhere/x"], "lora"),
    (["-m", "examples.demo", "--config=lroa"], "lora"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "named"), LINES, ids=[" ".join(line)[-60:] for line, _ in LINES])
def test_a_wrong_command_line_is_rejected_by_name(line, named, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "HF_HUB_OFFLINE": "1",
    }
    if line[0] == "train.py" and not any("--workdir" in word for word in line):
        line = [*line, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, *line],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=180,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert named in done.stderr
    assert not (tmp_path / "run").exists()
