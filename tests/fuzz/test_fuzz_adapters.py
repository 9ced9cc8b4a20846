"""Fuzzes the files of adapters, of this library and of PEFT."""

import dataclasses
import json
import shutil

import jax
import pytest
from fuzzing import COUNTS, JUNK, copied, fuzz, outcome, same
from hypothesis import strategies as st

from peft_jax.adapters import AdapterSpec, Hybrid, LoRA
from peft_jax.hub import load_adapter, save_adapter
from peft_jax.hub.adapter_files import CONFIG


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """Saves a hybrid and a LoRA adapter, and returns their folders and contents."""
    model, params = base
    made = {}
    for name, method in (
        ("hybrid", Hybrid(rank=2, block_size=4, gradient_init=False)),
        ("lora", LoRA(rank=2)),
    ):
        spec = AdapterSpec(method=method, target_modules=("q_proj", "down_proj"))
        state = spec.init(jax.random.key(1), params)
        folder = tmp_path_factory.mktemp("adapters") / name
        save_adapter(folder, model, spec, state, "base")
        made[name] = (folder, *load_adapter(folder, model, params))
    return made


def paths(value, where=()):
    yield where
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*where, key))


def changed(value, path, new):
    if not path:
        return new
    return {**value, path[0]: changed(value[path[0]], path[1:], new)}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["hybrid", "lora"])
def test_a_changed_setting_is_rejected_or_has_no_effect(base, saved, tmp_path, kind, count):
    model, params = base
    folder, spec, state = saved[kind]
    settings = json.loads((folder / CONFIG).read_text())
    every = sorted(paths(settings), key=str)
    place = copied(folder, tmp_path / "adapter")

    def check(path, value):
        (place / CONFIG).write_text(json.dumps(changed(settings, path, value)))
        found, message = outcome(lambda: load_adapter(place, model, params))
        if not message:
            assert found[0] == spec, f"{path} = {value!r} is accepted"
            assert same(found[1], state), f"{path} = {value!r} changes the arrays"

    fuzz(check, st.sampled_from(every), JUNK, count=count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["hybrid", "lora"])
def test_changed_bytes_are_rejected(base, saved, tmp_path, kind, count):
    model, params = base
    folder, _, state = saved[kind]
    arrays = next(folder.glob("*.safetensors")).name
    content = (folder / arrays).read_bytes()
    place = copied(folder, tmp_path / "adapter")

    def check(at, value, cut):
        whole = content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
        (place / arrays).write_bytes(whole[:at] if cut else whole)
        found, message = outcome(lambda: load_adapter(place, model, params))
        assert message or same(found[1], state), f"byte {at} ^ {value} is accepted"

    at = st.integers(0, len(content) - 1)
    fuzz(check, at, st.integers(1, 255), st.booleans(), count=count)


@pytest.mark.parametrize("count", COUNTS)
def test_a_changed_setting_of_peft_is_rejected_or_takes_effect(base, saved, tmp_path, count):
    """PEFT's files have no digest, so that an accepted setting must take effect."""
    model, params = base
    folder, _, _ = saved["lora"]
    place = tmp_path / "adapter"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, place / name)
    settings = json.loads((place / "adapter_config.json").read_text())
    spec, state = load_adapter(place, model, params)

    def check(key, value):
        given = {**settings, key: value}
        (place / "adapter_config.json").write_text(json.dumps(given))
        found, message = outcome(lambda: load_adapter(place, model, params))
        if message:
            return
        said = LoRA(
            rank=given["r"],
            alpha=float(given["lora_alpha"]),
            rank_stabilized=bool(given["use_rslora"]),
            dropout=float(given["lora_dropout"] or 0),
        )
        assert found[0] == dataclasses.replace(spec, method=said), f"{key} = {value!r} is accepted"
        assert same(found[1], state), f"{key} = {value!r} changes the arrays"

    fuzz(check, st.sampled_from(sorted(settings)), JUNK, count=count)
