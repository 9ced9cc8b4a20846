"""Damaged or edited adapters and non-finite values raise; another base is logged as a warning."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from peft_jax.adapters import BOFT, AdapterSpec, Full, Hybrid, LoRA
from peft_jax.hub import load_adapter, load_model, save_adapter, save_model
from peft_jax.hub.finite import check_finite
from peft_jax.models import build_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPECS = {
    "lora": AdapterSpec(method=LoRA(rank=2), modules_to_save=("norm",)),
    "boft of two factors": AdapterSpec(method=BOFT(block_size=4)),
    "hybrid": AdapterSpec(
        method=Hybrid(rank=2, block_size=4, gradient_init=False), alpha_pattern={"q_proj": 3.0}
    ),
    "full": AdapterSpec(method=Full(), target_modules=("norm",)),
}
CONFIG = "peft_jax_adapter.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Returns the folders of two bases of the same shape, and of one of another family."""
    folders = {}
    for seed, (name, config) in enumerate(
        {"one": LLAMA, "other": LLAMA, "family": LLAMA | {"model_type": "mistral"}}.items()
    ):
        model = build_model(config)
        folders[name] = tmp_path_factory.mktemp(name)
        save_model(folders[name], model, model.init_params(jax.random.key(seed)))
    return folders


@pytest.fixture
def saved(bases, tmp_path, arbitrary_state):
    """Returns a function that saves an adapter and returns its folder and base."""

    def save(name, **settings):
        model, params = load_model(bases["one"])
        spec = SPECS[name]
        state = arbitrary_state(spec, params)
        save_adapter(tmp_path / "adapter", model, spec, state, str(bases["one"]), **settings)
        return tmp_path / "adapter", model, params

    return save


def arrays_file(folder):
    return folder / json.loads((folder / CONFIG).read_text())["arrays"]


@pytest.mark.parametrize("name", SPECS)
def test_a_flipped_bit_is_detected(name, saved):
    folder, model, params = saved(name)
    file = arrays_file(folder)
    whole = file.read_bytes()
    load_adapter(folder, model, params)
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in np.random.default_rng(0).integers(start, len(whole), 4):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(place) % 8
        file.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
            load_adapter(folder, model, params)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hybrid", {"method": {"alpha": 17.0}}),
        ("hybrid", {"method": {"rank_stabilized": False}}),
        ("hybrid", {"alpha_pattern": {"q_proj": 4.0}}),
        ("hybrid", {"alpha_pattern": {}}),
        ("hybrid", {"quantization": "nf4"}),
        ("lora", {"method": {"alpha": 8.0}}),
        ("boft of two factors", {"method": {"dropout": 0.5}}),
        ("full", {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_an_edited_setting_is_detected(name, change, saved):
    folder, model, params = saved(name, quantization="none")
    file = folder / CONFIG
    config = json.loads(file.read_text())
    for key, value in change.items():
        config[key] = config[key] | value if key == "method" else value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{CONFIG} was changed"):
        load_adapter(folder, model, params)


def test_names_order_and_number_format_may_be_edited(saved):
    folder, model, params = saved("hybrid")
    file = folder / CONFIG
    config = json.loads(file.read_text())
    config["method"]["alpha"] = int(config["method"]["alpha"])
    config |= {"base_model_name_or_path": "someone/else", "note": "mine"}
    file.write_text(json.dumps(dict(reversed(config.items()))))
    assert load_adapter(folder, model, params)[0] == SPECS["hybrid"]


def test_an_adapter_without_digests_loads_with_one_warning(saved, caplog):
    folder, model, params = saved("lora")
    file = folder / CONFIG
    config = json.loads(file.read_text())
    for name in ("digests", "base_digest", "quantization"):  # peft_jax 0.1 wrote none of them.
        del config[name]
    file.write_text(json.dumps(config))
    load_adapter(folder, model, params)
    (record,) = caplog.records
    assert "no digests" in record.getMessage()


def test_the_same_base_gives_no_warning(saved, caplog):
    folder, model, params = saved("lora", quantization="none")
    load_adapter(folder, model, params)
    load_adapter(folder, dataclasses.replace(model, origin=""), params)
    assert not caplog.records


@pytest.mark.parametrize(
    ("base", "reason"), [("other", "weights differ"), ("family", "another family")]
)
def test_another_base_logs_a_warning_that_names_both(base, reason, saved, bases, caplog):
    folder, _, _ = saved("lora")
    with caplog.at_level(logging.WARNING):
        load_adapter(folder, *load_model(bases[base]))
    (record,) = caplog.records
    message = record.getMessage()
    assert reason in message
    assert str(bases["one"]) in message
    assert str(bases[base]) in message


def test_the_same_weights_in_other_files_give_no_warning(saved, bases, tmp_path, caplog):
    folder, model, params = saved("lora")
    save_model(tmp_path / "copy", model, params, max_shard_bytes=4000)
    load_adapter(folder, *load_model(tmp_path / "copy"))
    assert not caplog.records


def test_an_adapter_is_saved_although_its_base_was_deleted(
    bases, tmp_path, arbitrary_state, caplog
):
    model, params = load_model(bases["one"])
    model = dataclasses.replace(model, origin=str(tmp_path / "gone"))
    state = arbitrary_state(SPECS["lora"], params)
    save_adapter(tmp_path / "adapter", model, SPECS["lora"], state, "gone")
    (record,) = caplog.records
    assert "can no longer be read" in record.getMessage()
    load_adapter(tmp_path / "adapter", *load_model(bases["one"]))


@pytest.mark.parametrize(("trained", "used"), [("nf4", "none"), ("none", "int8")])
def test_another_quantization_logs_a_warning(trained, used, saved, bases, caplog):
    folder, _, _ = saved("lora", quantization=trained)
    model, params = load_model(bases["one"], quantization=used)
    load_adapter(folder, model, params)
    (record,) = caplog.records
    assert f"quantization {trained}" in record.getMessage()
    assert f"quantization {used}" in record.getMessage()


DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_check_finite_agrees_with_numpy(stored, wanted):
    rng = np.random.default_rng(0)
    stored, wanted = DTYPES[stored], DTYPES[wanted]
    patterns = np.frombuffer(rng.bytes(stored.itemsize * 4000), stored)
    limit = float(jnp.finfo(wanted).max)
    edges = np.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, limit, -limit], np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for value in [*patterns, *edges.astype(stored)]:
            fine = np.isfinite(value) and np.isfinite(np.asarray(value).astype(wanted))
            given = np.asarray([1.0, value, 2.0], stored)
            if fine and abs(float(value)) <= limit:
                check_finite(given, wanted, name="w", where="file")
            elif not fine:
                with pytest.raises(ValueError, match=r"^w in file holds"):
                    check_finite(given, wanted, name="w", where="file")


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_base_raises_with_the_tensor_name(value, quantization, tmp_path):
    model = build_model(LLAMA)
    save_model(tmp_path, model, model.init_params(jax.random.key(0)))
    file = tmp_path / "model.safetensors"
    tensors = {name: np.array(one) for name, one in safetensors.numpy.load_file(file).items()}
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name].reshape(-1)[-1] = value
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"^{name} in .*model\.safetensors .*NaN"):
        load_model(tmp_path, quantization=quantization)


def test_a_non_finite_peft_adapter_raises_with_the_tensor_name(saved):
    folder, model, params = saved("lora")
    (folder / CONFIG).unlink()
    file = folder / "adapter_model.safetensors"
    tensors = {name: np.array(one) for name, one in safetensors.numpy.load_file(file).items()}
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    tensors[name][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"^{name} in .*NaN"):
        load_adapter(folder, model, params)
