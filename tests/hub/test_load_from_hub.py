"""A path is a local folder, a name on the hub, or an error."""

import pytest

from peft_jax.hub import find_folder


def test_a_local_folder_is_returned_unchanged(tmp_path):
    assert find_folder(tmp_path) == tmp_path


def test_only_weights_and_json_and_tokenizers_are_fetched(monkeypatch, tmp_path):
    import huggingface_hub

    request = {}

    def snapshot_download(name, **arguments):
        request.update(arguments, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_folder("org/model-1.5", revision="v2") == tmp_path
    assert (request["name"], request["revision"]) == ("org/model-1.5", "v2")
    for excluded in ("pytorch_model.bin", "model.pt", "modeling_custom.py", "weights.pkl"):
        kept = huggingface_hub.utils.filter_repo_objects(
            [excluded, "model.safetensors"], allow_patterns=request["allow_patterns"]
        )
        assert list(kept) == ["model.safetensors"]


def test_an_unavailable_hub_name_raises_offline():
    with pytest.raises(ValueError, match=r"org/nothing.*HF_HUB_OFFLINE"):
        find_folder("org/nothing")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./model", "a/b/c", "../x"])
def test_a_path_that_is_not_a_hub_name_is_not_fetched(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="no folder"):
        find_folder(path)


def test_a_file_is_rejected(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        find_folder(file)
