"""Digests change exactly when the configuration, the tokenizer or the weights change."""

import hashlib
import json

import jax
import numpy as np
import pytest

from peft_jax import convert
from peft_jax.hub import digests, save_model
from peft_jax.models import build_model

TINY = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture
def folder(tmp_path):
    model = build_model(TINY)
    save_model(tmp_path / "base", model, model.init_params(jax.random.key(0)))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def halve_last(file):
    content = bytearray(file.read_bytes())
    content[-4:] = (np.frombuffer(content[-4:], "<f4") * 0.5).tobytes()
    file.write_bytes(content)


def test_a_file_below_the_limit_is_read_whole(tmp_path):
    file = tmp_path / "rows"
    file.write_bytes(bytes(range(256)) * 5)
    expected = hashlib.sha256(bytes(range(256)) * 5).hexdigest()
    assert digests.digest_file(file) == f"sha256:{expected}"


def test_the_digest_of_a_larger_file_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE_BELOW", 1000)
    monkeypatch.setattr(digests, "_BLOCK_BYTES", 10)
    file = tmp_path / "large"
    content = bytearray(2000)
    file.write_bytes(content)
    before = digests.digest_file(file)
    assert before.startswith("sampled-sha256:")
    for at in (0, 1999):
        file.write_bytes(content[:at] + b"x" + content[at + 1 :])
        assert digests.digest_file(file) != before
    file.write_bytes(bytes(2001))
    assert digests.digest_file(file) != before


def test_checkpoint_digests_cover_configuration_tokenizer_and_weights(folder):
    before = digests.digest_checkpoint(folder)
    assert sorted(before) == ["config.json", "model.safetensors", "tokenizer.json"]
    (folder / "README.md").write_text("a card")
    (folder / "generation_config.json").write_text("{}")
    assert digests.digest_checkpoint(folder) == before
    halve_last(folder / "model.safetensors")
    after = digests.digest_checkpoint(folder)
    assert digests.changes(before, after) == ["model.safetensors has changed"]
    assert "model.safetensors" not in digests.digest_checkpoint(folder, weights=False)


def test_weight_digests_cover_every_file_in_the_index(folder, tmp_path):
    model = build_model(TINY)
    split = tmp_path / "split"
    save_model(split, model, model.init_params(jax.random.key(0)), max_shard_bytes=2000)
    named = set(
        json.loads((split / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert len(named) > 1
    assert set(digests.digest_weights(split)) == named


@pytest.mark.parametrize("sampled", [False, True])
def test_digests_of_a_converted_checkpoint_read_its_arrays(folder, tmp_path, monkeypatch, sampled):
    if sampled:
        monkeypatch.setattr(digests, "WHOLE_BELOW", 0)
    out = tmp_path / "converted"
    convert.convert_checkpoint(str(folder), str(out), dtype="bfloat16")
    before = digests.digest_weights(out)
    prefix = "sampled-sha256:" if sampled else "sha256:"
    assert before
    assert all(digest.startswith(prefix) for digest in before.values())
    chunk = next(file for file in sorted((out / "arrays").rglob("c/**/*")) if file.is_file())
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    after = digests.digest_weights(out)
    assert len(digests.changes(before, after)) == 1


def test_a_combined_digest_does_not_depend_on_order():
    some = {"a": "sha256:1", "b": "sha256:2"}
    assert digests.combined(some) == digests.combined(dict(reversed(some.items())))
    assert digests.combined(some) != digests.combined({"a": "sha256:2", "b": "sha256:1"})
