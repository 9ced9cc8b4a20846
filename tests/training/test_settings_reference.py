"""Tests that every setting is listed once, with its default and meaning."""

import json

import pytest

from peft_jax import settings
from peft_jax.adapters import METHODS, method_settings
from peft_jax.training.config import default_config
from peft_jax.training.settings_reference import (
    OF_THE_METHOD,
    REQUIRED,
    settings_reference,
    to_markdown,
)

ROWS = {one.name: one for section in settings_reference() for one in section.settings}


def names_in(config, prefix=""):
    """Yields the dotted names of the settings in configuration files."""
    for key, value in config.items():
        if hasattr(value, "keys") and value:
            yield from names_in(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_reference_lists_the_settings_of_a_configuration():
    assert set(names_in(default_config())) == set(ROWS)
    assert sum(len(section.settings) for section in settings_reference()) == len(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_setting_has_a_meaning_and_its_default(name):
    row = ROWS[name]
    assert row.type
    assert row.meaning
    value = default_config()
    for part in name.split("."):
        value = value[part]
    if row.default in (REQUIRED, OF_THE_METHOD) or row.methods:
        assert value is None
    elif hasattr(value, "keys"):
        assert row.default == repr(value.to_dict())
    else:
        assert row.default == repr(value)


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_a_method_name_it(method):
    for key in method_settings(method):
        assert method in ROWS[f"method.{key}"].methods


def test_page_has_a_row_for_each_setting():
    rows = [line for line in to_markdown(settings_reference()).splitlines() if line[:3] == "| `"]
    assert [row.split("`")[1] for row in rows] == list(ROWS)
    assert {row.count("|") for row in rows} == {5}


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["settings", *arguments])
    code = settings.main()
    return code, *capsys.readouterr()


def test_command_prints_the_named_settings(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run_command(monkeypatch, capsys, "train.epochs", "optimizer")
    assert code == 0
    assert "--config.train.epochs: number or None; default: None" in out
    assert "--config.optimizer.schedule.name" in out
    assert "--config.model.path" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_command_prints_json(monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == list(ROWS)


def test_command_prints_the_page(monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "--markdown", "train")
    assert code == 0
    assert out.startswith("# Settings\n")
    assert "| `train.steps` |" in out


def test_command_rejects_an_unknown_setting(monkeypatch, capsys):
    code, _, error = run_command(monkeypatch, capsys, "train.epoch")
    assert code == 2
    assert "'train.epochs'" in error
