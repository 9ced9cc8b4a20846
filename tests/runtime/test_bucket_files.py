"""Tests files that are copied to and from a bucket, against a stand-in server."""

import pytest
from stand_in_bucket import BUCKET, serve

from peft_jax.runtime import buckets
from peft_jax.runtime.buckets import Bucket, check_names


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_files_of_any_size_return_as_they_were(scheme, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "_BYTES_IN_FLIGHT", 100)
    files = {f"folder/{number}": tmp_path / f"{number}" for number in range(20)}
    for number, file in enumerate(files.values()):
        file.write_bytes(bytes([number]) * (7 * number))
    with serve() as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        bucket = Bucket(f"{scheme}://{BUCKET}")
        bucket.upload(files)
        stand_in.objects["folder/"] = b""  # A console's sign that there is a folder.
        stand_in.objects["folder0"] = b"not in the folder"
        assert bucket.names("folder/") == sorted(files)
        copies = {name: tmp_path / "copies" / name for name in [*files, "missing"]}
        assert bucket.download(copies) == list(files)
        for name, file in files.items():
            assert copies[name].read_bytes() == file.read_bytes()
        bucket.delete(["folder/3", "missing"])
        assert bucket.names("folder/") == sorted(files.keys() - {"folder/3"})


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/etc/passwd", "a//b", "a\\b", "."])
def test_names_that_lead_elsewhere_are_rejected(name):
    check_names(["a/b", "a..b", ".hidden"], "gs://bucket")
    with pytest.raises(ValueError, match="gs://bucket has an object with the name"):
        check_names(["a", name], "gs://bucket")
