"""A path that is no folder is a name on the hub, or a clear error."""

import pytest

from peft_jax.hub import find_folder


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert find_folder(tmp_path) == tmp_path


def test_only_weights_and_json_and_tokenizers_are_fetched(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, **arguments):
        asked.update(arguments, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_folder("org/model-1.5", revision="v2") == tmp_path
    assert (asked["name"], asked["revision"]) == ("org/model-1.5", "v2")
    for refused in ("pytorch_model.bin", "model.pt", "modeling_custom.py", "weights.pkl"):
        kept = huggingface_hub.utils.filter_repo_objects(
            [refused, "model.safetensors"], allow_patterns=asked["allow_patterns"]
        )
        assert list(kept) == ["model.safetensors"]


def test_a_name_that_cannot_be_fetched_offline_says_so():
    with pytest.raises(ValueError, match=r"no folder org/nothing, and .* cannot be reached"):
        find_folder("org/nothing")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./model", "a/b/c", "../x"])
def test_a_path_that_is_no_hub_name_is_not_looked_for_there(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="there is no folder"):
        find_folder(path)


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="is a file: give the folder"):
        find_folder(file)
