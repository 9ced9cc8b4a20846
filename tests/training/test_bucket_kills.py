"""Tests that a run in a bucket, killed and resumed on other hosts, equals an uninterrupted one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in_bucket import BUCKET, serve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(checkpoint, data):
    return [
        "--config=configs/finetune.py:lora,precision=float32",
        f"--config.model.path={checkpoint}",
        "--config.data.recipe=alpaca",
        f"--config.data.path={data / 'words'}",
        "--config.data.prompt_template={instruction}",
        "--config.data.completion_template= {output}",
        "--config.method.target_modules=q_proj,down_proj",
        "--config.method.rank=2",
        "--config.method.dropout=0.1",
        "--config.train.steps=240",
        "--config.train.batch_size=4",
        "--config.train.max_length=16",
        "--config.checkpoint.every=10",
        "--config.evaluate.every=100",
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Returns the folder of an uninterrupted run on disk."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start("train.py", *flags, f"--workdir={folder}"), 0)
    return folder


def start(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            **environment,
        },
    )


def finish(process: subprocess.Popen, code: int) -> tuple[str, str]:
    """Returns the output of a process, which must end with an exit code."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def wait_for_checkpoint(objects: dict[str, bytes], least: int, process: subprocess.Popen) -> None:
    """Waits until the bucket has a complete checkpoint of a step, or of a later one."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the run ended by itself:\n{process.communicate()[1]}")
        whole = [name.split("/")[-2] for name in list(objects) if name.endswith("/manifest.json")]
        if any(int(step) >= least for step in whole):
            return
        time.sleep(0.01)
    pytest.fail(f"there is no checkpoint of step {least}")


def untimed(lines: str) -> list[dict]:
    return [
        {key: value for key, value in json.loads(line).items() if key != "timing"}
        for line in lines.splitlines()
    ]


def two_processes(flags: list[str], environment: dict[str, str]) -> list[subprocess.Popen]:
    """Starts a run in two processes of two devices, which share nothing but the bucket."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(
            *("train.py", *flags, f"--process_id={index}", "--num_processes=2"),
            f"--coordinator=localhost:{port}",
            **{
                **environment,
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "PEFT_JAX_CACHE": f"{environment['PEFT_JAX_CACHE']} {index}",
            },
        )
        for index in range(2)
    ]


def test_processes_share_nothing_but_the_bucket(flags, tmp_path):
    """A run of two processes is extended by two others, and then by one."""
    url = f"s3://{BUCKET}/runs/first"
    flags = [
        *flags,
        "--config.parallel.fsdp=2",
        "--config.checkpoint.every=2",
        "--config.optimizer.schedule.name=constant",
    ]

    def steps(count: int) -> list[str]:
        return [
            *flags,
            f"--config.train.steps={count}",
            "--config.optimizer.schedule.name=constant",
        ]

    four = "--xla_force_host_platform_device_count=4"
    finish(start("train.py", *steps(6), f"--workdir={tmp_path / 'run'}", XLA_FLAGS=four), 0)
    with serve() as bucket:
        for count in (2, 4):
            cache = {"PEFT_JAX_CACHE": str(tmp_path / f"hosts of {count}")}
            both = two_processes([*steps(count), f"--workdir={url}"], bucket.environment | cache)
            said = [finish(process, 0)[1] for process in both]
            assert ("resuming from step 2 of 4" in said[0]) == (count == 4)
            written = [name for name in bucket.objects if f"/checkpoints/{count}/" in name]
            assert any(name.endswith("array_metadatas/process_1") for name in written)
        cache = str(tmp_path / "one host")
        environment = {"XLA_FLAGS": four, "PEFT_JAX_CACHE": cache, **bucket.environment}
        _, said = finish(start("train.py", *steps(6), f"--workdir={url}", **environment), 0)
        assert "resuming from step 4 of 6" in said
        lines = bucket.objects["runs/first/metrics.jsonl"].decode()
        losses, expected = (
            [record["loss"] for record in untimed(text) if record["split"] == "train"]
            for text in (lines, (tmp_path / "run" / "metrics.jsonl").read_text())
        )
        assert len(losses) == 6
        assert losses == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_killed_run_on_other_hosts_equals_an_uninterrupted_one(
    scheme, flags, whole, tmp_path, shared_data
):
    url = f"{scheme}://{BUCKET}/runs/first"
    with serve() as bucket:

        def host(number: int, *words: str) -> subprocess.Popen:
            cache = str(tmp_path / f"host {number}")
            return start(*words, PEFT_JAX_CACHE=cache, **bucket.environment)

        killed = host(1, "train.py", *flags, f"--workdir={url}")
        wait_for_checkpoint(bucket.objects, 20, killed)
        killed.kill()
        finish(killed, -signal.SIGKILL)
        stopped = host(2, "train.py", *flags, f"--workdir={url}")
        wait_for_checkpoint(bucket.objects, 80, stopped)
        stopped.terminate()
        _, said = finish(stopped, 143)
        assert "which did not give it back" in said
        assert f"the same command resumes from {url}/checkpoints/" in said
        assert "runs/first/summary.json" not in bucket.objects
        _, said = finish(host(3, "train.py", *flags, f"--workdir={url}"), 0)
        assert "of 240" in said.partition("resuming from step ")[2]
        assert f"{url}/report/README.md" in said

        files = {name.removeprefix("runs/first/"): text for name, text in bucket.objects.items()}
        for name in ("adapter_model.safetensors", "peft_jax_adapter.json"):
            assert files[f"adapter/{name}"] == (whole / "adapter" / name).read_bytes()
        lines = (whole / "metrics.jsonl").read_text()
        assert untimed(files["metrics.jsonl"].decode()) == untimed(lines)
        assert "owner.json" not in files

        evaluation = host(
            4,
            *("-m", "eval", f"--workdir={url}", f"--data={shared_data}"),
            *("--tasks=cola", "--limit=2"),
        )
        _, said = finish(evaluation, 0)
        assert f"results: {url}/eval" in said
        assert b"cola" in bucket.objects["runs/first/eval/results.json"]
        prompt = ("--prompt=w1 w2", "--max_new_tokens=3")
        generation = host(5, "-m", "peft_jax.generation", f"--adapter={url}/adapter", *prompt)
        from_disk = start("-m", "peft_jax.generation", f"--adapter={whole / 'adapter'}", *prompt)
        assert finish(generation, 0)[0] == finish(from_disk, 0)[0]
        out = tmp_path / "exported"
        export = ("-m", "peft_jax", "export", f"--workdir={url}", f"--output={out}")
        finish(host(6, *export, "--format=peft"), 0)
        assert (out / "adapter_model.safetensors").is_file()
