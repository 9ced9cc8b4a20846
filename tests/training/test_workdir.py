"""A work directory that cannot be used is refused by name, before anything is done."""

import os

import pytest

from peft_jax.runtime.errors import RefusedError
from peft_jax.training.workdir import WorkDir


@pytest.fixture
def config(tiny):
    return tiny()


def refusal(path, config):
    with pytest.raises(RefusedError) as refused:
        WorkDir.at(path).check(config)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_link_that_leads_nowhere(tmp_path, config):
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "elsewhere")
    for path in (link, link / "below"):
        message = refusal(path, config)
        assert f"{link} is a link to {tmp_path / 'elsewhere'}, which does not exist" in message


def test_a_link_that_leads_back_to_itself(tmp_path, config):
    (tmp_path / "run").symlink_to(tmp_path / "run")
    assert "is a link to" in refusal(tmp_path / "run", config)


def test_a_file_and_a_folder_in_a_file(tmp_path, config):
    (tmp_path / "file").touch()
    assert "is a file; give a folder" in refusal(tmp_path / "file", config)
    assert f"lies in {tmp_path / 'file'}, which is a file" in refusal(
        tmp_path / "file" / "run", config
    )


def test_a_name_that_is_too_long(tmp_path, config):
    assert "File name too long" in refusal(tmp_path / ("x" * 300), config)


def test_a_link_to_a_folder_is_one(tmp_path, config):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    assert WorkDir.at(tmp_path / "run").check(config) == []


@pytest.mark.parametrize("path", ["runs/\udcff", "~nobody-of-that-name/run"])
def test_a_path_that_means_nothing(path):
    with pytest.raises(RefusedError, match=r"not UTF-8|no home folder of that user"):
        WorkDir.at(path)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    # The tests may run as a user who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    for path in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(
            RefusedError, match=f"^{tmp_path}.* cannot be written to; give a --workdir"
        ):
            WorkDir.at(path).check_writable()
    (tmp_path / "mine").mkdir()
    WorkDir.at(tmp_path / "mine").check_writable()


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "llama"}', "\udcff"])
def test_a_configuration_that_is_no_run_s(tmp_path, config, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "cannot tell whether the folder is its own" in refusal(tmp_path, config)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_summary_that_is_none_is_said(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    said = []
    assert WorkDir.at(tmp_path).read_summary(say=said.append) is None
    assert len(said) == 1
    assert "summary.json cannot be read" in said[0]
