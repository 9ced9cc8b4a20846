"""The commands of `peft-jax`: one look for every --help, and configurations found by name."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from peft_jax.commands import config_flags, main
from peft_jax.commands.main import COMMANDS
from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.processes import ProcessSettings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def help_of(monkeypatch, capsys):
    """Returns a function from a command's name to its --help."""
    monkeypatch.setattr(sys, "argv", ["peft-jax"])
    monkeypatch.setitem(os.environ, "COLUMNS", "200")

    def print_help(name: str) -> str:
        with pytest.raises(SystemExit) as left:
            main.main([name, "--help"])
        assert left.value.code == 0
        return capsys.readouterr().out

    return print_help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_wraps_at_80_columns_and_gives_each_default(help_of, name):
    text = help_of(name)
    assert text.startswith(f"usage: peft-jax {name} ")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    _, _, flags = text.partition("\noptions:\n")
    required = ("--output", *(("--adapter", "--weight") if name == "combine" else ()))
    for flag in re.split(r"\n  (?=-)", flags)[1:]:
        if not flag.startswith(("-h", *required)):
            assert "default" in flag, flag


def test_the_help_of_train_gives_the_default_of_the_settings(help_of):
    """The parser states the default itself, so that it reports a typo before JAX starts."""
    text = " ".join(help_of("train").split())
    assert f"ends the others (default: {ProcessSettings().contact_timeout})" in text


def test_the_help_of_train_has_its_own_flags_alone(help_of):
    found = set(re.findall(r"^  (--[\w.]+)", help_of("train"), re.MULTILINE))
    assert found == {
        *(
            "--traceback",
            "--import",
            "--config",
            "--config.SECTION.SETTING",
            "--workdir",
            "--allow_changed",
        ),
        *("--plan", "--search", "--topology", "--json", "--distributed", "--coordinator"),
        *("--num_processes", "--process_id", "--contact_timeout"),
    }


def test_a_command_that_there_is_not_is_rejected(capsys):
    with pytest.raises(SystemExit) as left:
        main.main(["trian"])
    assert left.value.code == 2
    assert "'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["finetune.py", "configs/finetune.py"])
def test_a_configuration_that_comes_along_is_found_by_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_flags.find_config_file(path) == ROOT / "configs" / "finetune.py"
    own = tmp_path / path
    own.parent.mkdir(exist_ok=True)
    own.write_text("")
    assert config_flags.find_config_file(path) == Path(path)


def test_a_configuration_that_there_is_not_is_rejected_with_the_nearest():
    with pytest.raises(RefusedError, match=r"finetun\.py; did you mean finetune\.py"):
        config_flags.find_config_file("finetun.py")


def test_a_line_is_split_between_the_configuration_and_the_flags():
    line = "--config a.py --plan --config.train.steps 3 --noconfig.logging.tensorboard stray"
    of_config, others = config_flags.split(line.split())
    assert of_config == [
        *("--config=a.py", "--config.train.steps=3", "--noconfig.logging.tensorboard")
    ]
    assert others == ["--plan", "stray"]


def test_a_setting_is_changed_by_its_flag():
    words = ["--config.train.steps=7", "--config=configs/finetune.py:lora", "--config.seed=3"]
    given = config_flags.load_config(words)
    assert given.name == "configs/finetune.py:lora"
    assert (given.values.train.steps, given.values.seed) == (7, 3)
    assert given.values.method.name == "lora"


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.mesh.fsdp=4", "'mesh'; did you mean --config.parallel.fsdp?"),
        ("--config.trian.own=3", "no section 'trian'; did you mean 'train'?"),
        ("--config.optimizer.schedul.own=3", "'schedul' in optimizer; did you mean 'schedule'?"),
        ("--config.model.path.own=3", "model.path is a setting, not a section"),
        ("--config..=3", "names no setting"),
    ],
)
def test_a_section_that_there_is_not_is_rejected_with_the_nearest(flag, said):
    parser = config_flags.ConfigArguments("test", description=None)
    with pytest.raises(RefusedError) as rejected:
        parser.parse_args(["--config=configs/finetune.py:lora", flag])
    assert said in str(rejected.value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda f: f.name)
def test_configurations_import_the_library_alone(file):
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for one in nodes if isinstance(one, ast.Import) for alias in one.names]
    names += [one.module or "" for one in nodes if isinstance(one, ast.ImportFrom)]
    imported = {name.partition(".")[0] for name in names}
    others = imported - set(sys.stdlib_module_names) - {"ml_collections", "peft_jax"}
    assert not others
