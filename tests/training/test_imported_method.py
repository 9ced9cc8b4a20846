"""A method of a user's own package, through every command that meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCALED = ROOT / "tests" / "scaled_method.py"


def peft_jax(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "peft_jax", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            **os.environ,
            "XLA_FLAGS": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": str(ROOT),
        },
    )


@pytest.mark.slow
def test_an_imported_method_trains_generates_and_is_exported(checkpoint, data, tmp_path):
    (tmp_path / "my_method.py").write_text(
        f"{SCALED.read_text()}\n\nimport peft_jax as pj\n\npj.register_method(Scaled)\n"
    )
    imported = "--import=my_method"
    trained = peft_jax(
        tmp_path,
        "train",
        imported,
        f"--config={ROOT / 'configs/finetune.py'}:scaled,precision=float32",
        "--workdir=run",
        f"--config.model.path={checkpoint}",
        "--config.data.recipe=alpaca",
        f"--config.data.path={data / 'words'}",
        "--config.data.prompt_template={instruction}",
        "--config.data.completion_template= {output}",
        "--config.method.strength=2",
        "--config.train.steps=20",
        "--config.train.batch_size=4",
        "--config.train.max_length=16",
    )
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["method"] == "scaled"
    assert summary["after"]["loss"] < summary["before"]["loss"]
    generated = peft_jax(
        tmp_path, "generate", imported, "--adapter=run/adapter", "--prompt=w1 w2", "--json"
    )
    assert generated.returncode == 0, generated.stderr
    exported = peft_jax(
        tmp_path, "export", imported, "--workdir=run", "--format=merged", "--output=merged"
    )
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "merged/config.json").is_file()
    unknown = peft_jax(tmp_path, "generate", "--adapter=run/adapter", "--prompt=w1")
    assert unknown.returncode == 2
    assert "scaled" in unknown.stderr
    assert "--import" in unknown.stderr


def test_a_module_that_is_not_there_is_named(tmp_path):
    found = peft_jax(tmp_path, "generate", "--import=my_mehtod", "--model=x", "--prompt=y")
    assert found.returncode == 2
    assert "my_mehtod" in found.stderr
