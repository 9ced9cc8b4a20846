"""The wheel, installed away from the repository: what is in it, and that every command works."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from peft_jax.commands.main import COMMANDS
from peft_jax.version import __version__

pytestmark = pytest.mark.slow
pytest.importorskip("build", reason="the wheel is built by the package build")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("peft_jax", "kernels_pallas", "eval", "configs", "assets", "docs", "examples", "benchmarks"),
    *("tests", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "mkdocs.yml", "train.py"),
)
INSIDE = {"eval": "peft_jax/eval", "configs": "peft_jax/configs"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the source archive, by ending; the wheel is built from the archive."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copyfile(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", str(source)],
        check=True,
        capture_output=True,
    )
    return {file.suffix: file for file in (source / "dist").iterdir()}


def test_the_wheel_holds_two_packages_and_all_their_modules(built):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"peft_jax", "kernels_pallas", f"peft_jax-{__version__}.dist-info"}
    for folder in ("peft_jax", "kernels_pallas", *INSIDE):
        here = {
            f"{INSIDE.get(folder, folder)}/{file.relative_to(ROOT / folder).as_posix()}"
            for file in (ROOT / folder).rglob("*.py")
        }
        assert here <= set(names), here - set(names)
    assert "peft_jax/py.typed" in names


class Installed:
    """The wheel in an environment of its own, and an empty folder to work in.

    Other packages are those of the environment that runs the tests.
    """

    def __init__(self, folder: Path, wheel: Path):
        environment = folder / "environment"
        venv.create(environment, symlinks=True)
        self.bin = environment / "bin"
        self.folder = folder / "work"
        self.folder.mkdir()
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python")]
        subprocess.run(
            [*pip, "install", "-qq", "--no-deps", "--no-index", str(wheel)],
            check=True,
            capture_output=True,
        )
        (site,) = environment.glob("lib/python*/site-packages")
        others = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
        (site / "others.pth").write_text("\n".join(sorted(others)))

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment, and checks how it ends."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        done = subprocess.run(
            [str(self.bin / words[0]), *words[1:]],
            cwd=self.folder,
            env=kept | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Installed:
    """The wheel, with a small checkpoint and rows to learn from."""
    made = Installed(tmp_path_factory.mktemp("away"), built[".whl"])
    shutil.copytree(ROOT / "assets" / "tiny_world", made.folder / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {word}."},
                {"role": "assistant", "content": word},
            ]
        }
        for word in ("bird", "tree", "river", "stone") * 16
    ]
    (made.folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sums = [{"question": f"What is 1 + {n}?", "answer": f"#### {n + 1}"} for n in range(9)]
    (made.folder / "data" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        file = made.folder / "data" / "gsm8k" / f"{split}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    return made


TRAIN = (
    "--config=finetune.py:lora,precision=float32",
    "--config.model.path=base",
    "--config.data.recipe=chat",
    "--config.data.path=rows.jsonl",
    "--config.data.hold_out=8",
    "--config.train.batch_size=4",
    "--config.train.max_length=64",
)


@pytest.fixture(scope="module")
def trained(installed) -> Path:
    """The work directory of a run by the console command."""
    done = installed.run("peft-jax", "train", *TRAIN, "--config.train.steps=4")
    assert "WARNING" not in done.stderr
    return installed.folder / "runs" / "finetune-lora-precision-float32"


def test_a_run_leaves_an_adapter(trained):
    assert (trained / "summary.json").is_file()
    assert (trained / "adapter" / "adapter_model.safetensors").is_file()


def test_the_adapter_generates(installed, trained):
    line = ("--prompt=Say bird.", "--chat", "--max_new_tokens=4", "--json")
    done = installed.run("peft-jax", "generate", f"--adapter={trained / 'adapter'}", *line)
    assert json.loads(done.stdout)["new_tokens"] > 0


def test_the_run_is_evaluated(installed, trained):
    pytest.importorskip("lm_eval")
    line = ("--tasks=gsm8k", "--data=data", "--limit=2", "--max_new_tokens=4", "--num_fewshot=0")
    installed.run("peft-jax", "eval", f"--workdir={trained}", *line)
    assert "gsm8k" in (trained / "eval" / "results.md").read_text()


def test_generated_code_has_its_sandbox(installed):
    code = (
        "from peft_jax.eval.sandbox import Sandbox\n"
        "sandbox = Sandbox(isolated=False)\n"
        "print(sandbox.run('assert 1 + 1 == 2').verdict, sandbox.run('assert 0').verdict)"
    )
    assert installed.run("python", "-c", code).stdout.split() == ["passed", "failed"]


def test_the_adapter_is_exported_as_a_model_and_for_peft(installed, trained):
    installed.run("peft-jax", "export", f"--workdir={trained}", "--output=model")
    installed.run("peft-jax", "export", f"--workdir={trained}", "--output=peft", "--format=peft")
    assert {file.name for file in (installed.folder / "peft").iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    }
    code = (
        "import numpy as np, peft_jax as pj\n"
        "tokens = np.arange(8)[None] + 5\n"
        "model, params = pj.load_model('base')\n"
        f"logits = []\n"
        f"for folder in ({str(trained / 'adapter')!r}, 'peft'):\n"
        "    spec, state = pj.load_adapter(folder, model, params)\n"
        "    logits.append(model(spec.bind(params, state), tokens))\n"
        "merged, whole = pj.load_model('model')\n"
        "logits += [merged(whole, tokens), model(params, tokens)]\n"
        "print(*(float(abs(one - logits[0]).max()) for one in logits[1:]))"
    )
    of_peft, of_whole, of_base = map(float, installed.run("python", "-c", code).stdout.split())
    assert of_peft == 0
    assert of_whole < 1e-4 < of_base


def test_an_export_is_rejected_by_name(installed, trained):
    done = installed.run("peft-jax", "export", "--workdir=nowhere", "--output=out", code=2)
    assert done.stderr.startswith("peft-jax export: nowhere has no adapter/")
    done = installed.run("peft-jax", "export", f"--workdir={trained}", "--output=base", code=2)
    assert "give a new folder" in done.stderr


def test_a_run_is_planned(installed):
    line = ("plan", *TRAIN, "--config.train.steps=4", "--topology=cpu", "--json")
    assert json.loads(installed.run("peft-jax", *line).stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(installed, name):
    if name == "eval":
        pytest.importorskip("lm_eval")
    text = installed.run("peft-jax", name, "--help").stdout
    assert text.startswith(f"usage: peft-jax {name} ")


def test_python_starts_the_same_program(installed):
    done = installed.run("python", "-m", "peft_jax", "--version")
    assert done.stdout == f"peft_jax {__version__}\n"
    assert "--config.train.steps" in installed.run("peft-jax", "settings", "train.steps").stdout


def test_the_front_door_is_open(installed):
    code = (
        "import peft_jax as pj, sys\n"
        "assert 'jax' not in sys.modules\n"
        "print(pj.__file__, *(getattr(pj, name) is not None for name in pj.__all__))"
    )
    file, *found = installed.run("python", "-c", code).stdout.split()
    assert Path(file).is_relative_to(installed.bin.parent)
    assert set(found) == {"True"}
