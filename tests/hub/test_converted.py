"""Converted checkpoints hold the source's values, in a folder and in a bucket."""

import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from stand_in_bucket import BUCKET, serve

from peft_jax import convert as command
from peft_jax.core import flatten
from peft_jax.hub import converted, find_folder, load_model, save_model
from peft_jax.hub.adapter_base import base_digest
from peft_jax.models import build_model, quantize_params
from peft_jax.runtime import buckets

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the folder of a checkpoint of several files, and its parameters."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build_model(CONFIG)
    params = model.init_params(jax.random.key(0))
    save_model(folder, model, params, max_shard_bytes=400_000)
    (folder / "tokenizer.json").write_text("{}")
    return folder, params


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_converted_checkpoint_loads_with_the_same_values(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "_PIECE", 64 * 40)
    folder, params = saved
    assert command.main([str(folder), str(tmp_path / "out"), "--dtype=float32"]) == 0
    _, loaded = load_model(tmp_path / "out")
    assert_same(loaded, params)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "converting").exists()
    sharding = NamedSharding(jax.make_mesh((8,), ("a",)), PartitionSpec())
    _, quantized = load_model(tmp_path / "out", quantization="int8", sharding=sharding)
    assert_same(quantized, quantize_params(params, "int8"))


def test_reading_a_range_needs_only_its_chunks(saved, tmp_path, monkeypatch):
    folder, params = saved
    command.convert_checkpoint(str(folder), str(tmp_path), dtype="float32")
    path = ("layers", "mlp", "down_proj", "kernel")
    leaf = converted.open_converted(tmp_path, build_model(CONFIG))[path]
    # The kernel is [640, 64] in chunks of 256 rows. The range is readable without other chunks.
    chunks = tmp_path / "arrays" / "layers.mlp.down_proj.kernel" / "c"
    for chunk in sorted(file for file in chunks.rglob("*") if file.is_file()):
        layer, row, _ = chunk.relative_to(chunks).parts
        if (layer, row) != ("1", "1"):
            chunk.unlink()
    part = np.empty((1, 100, 64), np.float32)
    leaf.read_into(part, ((1, 2), (300, 400), (0, 64)))
    np.testing.assert_array_equal(part, flatten(params)[path][1:2, 300:400])


def test_an_interrupted_conversion_resumes_with_the_same_result(saved, tmp_path, monkeypatch):
    folder, params = saved
    copied = []
    original = converted._copy

    def copy(source, array, part, dtype):
        if len(copied) == 11:
            raise KeyboardInterrupt
        copied.append(part)
        original(source, array, part, dtype)

    monkeypatch.setattr(converted, "_copy", copy)
    with pytest.raises(KeyboardInterrupt):
        command.convert_checkpoint(str(folder), str(tmp_path), dtype="float32")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="unfinished conversion"):
        command.convert_checkpoint(str(folder), str(tmp_path), dtype="bfloat16")
    monkeypatch.setattr(converted, "_copy", lambda *a: (copied.append(a[2]), original(*a)))
    command.convert_checkpoint(str(folder), str(tmp_path), dtype="float32")
    # Seven kernels are copied once per layer, and five other leaves once.
    assert len(copied) == 3 * 7 + 5
    assert_same(load_model(tmp_path)[1], params)


def test_existing_conversions_are_not_overwritten(saved, tmp_path, capsys):
    folder, _ = saved
    command.convert_checkpoint(str(folder), str(tmp_path))
    assert command.main([str(folder), str(tmp_path)]) == 0
    assert "already holds this checkpoint" in capsys.readouterr().out
    other = tmp_path / "other"
    model = build_model(CONFIG | {"num_hidden_layers": 1})
    save_model(other, model, model.init_params(jax.random.key(1)))
    assert command.main([str(other), str(tmp_path)]) == 2
    assert "holds another checkpoint" in capsys.readouterr().err
    assert command.main([str(tmp_path), str(tmp_path / "twice")]) == 2
    assert "is already converted" in capsys.readouterr().err
    assert command.main([str(folder), str(tmp_path), "--dtype=bfloat16"]) == 2
    assert "in float32, not in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_preserved_by_default(stored, tmp_path, capsys, caplog):
    model = build_model(CONFIG)
    params = model.init_params(jax.random.key(0), stored if stored != "float16" else "float32")
    params = jax.tree.map(lambda leaf: leaf.astype(stored), params)
    save_model(tmp_path / "source", model, params)
    assert command.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    assert "rounded" not in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / converted.MANIFEST).read_text())
    assert manifest["dtype"] == stored
    _, loaded = load_model(tmp_path / "out")
    assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (stored != "float32")
    assert all(f"holds {stored} and is loaded in float32" in message for message in messages)
    # The digest of the weights does not depend on their format.
    assert base_digest(tmp_path / "out") == base_digest(tmp_path / "source")


def test_rounding_is_reported_and_loading_in_float32_logs_a_warning(
    saved, tmp_path, capsys, caplog
):
    folder, _ = saved
    assert command.main([str(folder), str(tmp_path), "--dtype=bfloat16"]) == 0
    assert "rounding weights from F32 to bfloat16" in capsys.readouterr().out
    load_model(tmp_path, dtype=jnp.bfloat16)
    assert not caplog.records
    load_model(tmp_path)
    (record,) = caplog.records
    assert "was rounded" in record.getMessage()
    assert base_digest(tmp_path) is None


def test_a_location_with_other_files_is_not_overwritten(saved, tmp_path):
    folder, _ = saved
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        command.convert_checkpoint(str(folder), f"file://{folder}")
    assert sorted(folder.iterdir()) == before
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"holds config\.json"):
        command.convert_checkpoint(str(folder), str(tmp_path))
    assert (tmp_path / "config.json").read_text() == "mine"
    with pytest.raises(ValueError, match=r"config\.json is a file"):
        command.convert_checkpoint(str(folder), str(tmp_path / "config.json"))


def test_another_architecture_raises_with_the_array(saved, tmp_path):
    folder, _ = saved
    command.convert_checkpoint(str(folder), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 320}))
    with pytest.raises(ValueError, match=r"down_proj.kernel .*\[3, 640, 64\]"):
        load_model(tmp_path)


def test_an_empty_or_unreachable_location_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="no converted checkpoint"):
        find_folder(f"file://{tmp_path}")
    with pytest.raises(ValueError, match="cannot be reached"):
        find_folder("gs://not a bucket/model")


@pytest.fixture
def bucket(monkeypatch):
    """Yields the objects of the bucket of the test."""
    with serve() as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        yield stand_in.objects


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_is_written_and_loaded(saved, bucket, tmp_path, monkeypatch, scheme):
    monkeypatch.setenv("PEFT_JAX_CACHE", str(tmp_path))
    folder, params = saved
    place = f"{scheme}://{BUCKET}/models/tiny"
    bucket["models/tiny/config.json"] = b"mine"
    with pytest.raises(ValueError, match=r"holds config\.json"):
        command.convert_checkpoint(str(folder), place)
    del bucket["models/tiny/config.json"]
    bucket["models/tiny-other/config.json"] = b"not in the way"
    command.convert_checkpoint(str(folder), place)
    del bucket["models/tiny-other/config.json"]
    assert {name.split("/")[2] for name in bucket} == {
        "arrays",
        "config.json",
        "peft_jax_checkpoint.json",
        "tokenizer.json",
    }
    _, loaded = load_model(place, dtype=jnp.bfloat16)
    assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    # Only the small files are fetched; the arrays stay in the bucket.
    (fetched,) = (tmp_path / "checkpoints").iterdir()
    assert sorted(file.name for file in fetched.iterdir()) == [
        "config.json",
        "peft_jax_checkpoint.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("place", ["http://localhost:1/a", "ftp://host/a", "memory://a", "://a"])
def test_an_unsupported_url_scheme_is_rejected(saved, place, capsys):
    folder, _ = saved
    assert command.main([str(folder), place]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"peft_jax.convert: {place} begins with {place.partition(':')[0]}://")
    assert "give gs://bucket/folder" in message
    with pytest.raises(ValueError, match=f"{place.partition(':')[0]}://"):
        find_folder(place)


@pytest.fixture
def silent_bucket(monkeypatch):
    """Starts a server that accepts connections and never responds."""
    with socket.create_server(("localhost", 0)) as server:
        monkeypatch.setenv(
            "TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.getsockname()[1]}"
        )
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield


def test_a_bucket_that_does_not_respond_times_out(saved, silent_bucket, monkeypatch, capsys):
    assert buckets.CONTACT_SECONDS < 20
    monkeypatch.setattr(buckets, "CONTACT_SECONDS", 0.2)
    place = "gs://bucket-of-the-test/model"
    assert command.main([str(saved[0]), place]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"peft_jax.convert: {place} cannot be reached")
    assert message.count("\n") == 1
    with pytest.raises(ValueError, match="cannot be reached"):
        find_folder(place)
