"""Tests that unusable work directories are rejected before anything is done."""

import os

import pytest

from peft_jax.runtime.errors import RefusedError
from peft_jax.training.workdir import WorkDir, compare_configs


@pytest.fixture
def config(tiny):
    return tiny()


def refusal(path, config):
    with pytest.raises(RefusedError) as refused:
        WorkDir.at(path).check(config)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_broken_link_is_rejected(tmp_path, config):
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "elsewhere")
    for path in (link, link / "below"):
        message = refusal(path, config)
        assert f"{link} is a link to {tmp_path / 'elsewhere'}, which does not exist" in message


def test_link_to_itself_is_rejected(tmp_path, config):
    (tmp_path / "run").symlink_to(tmp_path / "run")
    assert "is a link to" in refusal(tmp_path / "run", config)


def test_file_and_path_inside_a_file_are_rejected(tmp_path, config):
    (tmp_path / "file").touch()
    assert "is a file; give a folder" in refusal(tmp_path / "file", config)
    assert f"lies in {tmp_path / 'file'}, which is a file" in refusal(
        tmp_path / "file" / "run", config
    )


def test_too_long_name_is_rejected(tmp_path, config):
    assert "File name too long" in refusal(tmp_path / ("x" * 300), config)


def test_link_to_a_folder_is_accepted(tmp_path, config):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    assert WorkDir.at(tmp_path / "run").check(config) == []


def test_passes_of_the_start_may_differ_only_from_a_record_of_0_1(tiny):
    """Version 0.1 took six and did not record them; the start is in its checkpoint."""
    config = tiny(method__name="lora_ga", method__rank=2)
    record = config.to_mapping()
    other = tiny(method__name="lora_ga", method__rank=2, method__init_passes=6)
    with pytest.raises(RefusedError, match=r"method\.init_passes: 1 there, 6 now"):
        compare_configs(record, other, where="here")
    del record["method"]["init_passes"]
    for now in (config, other):
        assert compare_configs(record, now, where="here") == []


@pytest.mark.parametrize("path", ["runs/\udcff", "~nobody-of-that-name/run"])
def test_invalid_path_is_rejected(path):
    with pytest.raises(RefusedError, match=r"UTF-8|home folder"):
        WorkDir.at(path)


def test_folder_without_write_permission_is_rejected(tmp_path, monkeypatch):
    # Mocks access, because the tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    for path in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(RefusedError, match=f"^{tmp_path}.* not writable"):
            WorkDir.at(path).check_writable()
    (tmp_path / "mine").mkdir()
    WorkDir.at(tmp_path / "mine").check_writable()


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "llama"}', "\udcff"])
def test_invalid_configuration_file_is_rejected(tmp_path, config, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "config.json cannot be read" in refusal(tmp_path, config)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_invalid_summary_is_reported(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    said = []
    assert WorkDir.at(tmp_path).read_summary(say=said.append) is None
    assert len(said) == 1
    assert "summary.json cannot be read" in said[0]
