"""Saved adapters are restored bit for bit, written atomically, and fit their own base only."""

import dataclasses
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from peft_jax.adapters import (
    BOFT,
    EVA,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    AdapterSpec,
    AdapterState,
    DoRA,
    FourierFT,
    Full,
    GraLoRA,
    HiRA,
    Hybrid,
    LNTuning,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAGA,
    LoRAOne,
    MiSS,
    PiSSA,
    RandLora,
    SHiRA,
    Unitary,
    VeRA,
)
from peft_jax.core import flatten, unflatten
from peft_jax.hub import load_adapter, load_model, save_adapter
from peft_jax.models import build_model
from peft_jax.runtime.files import atomic_folder

LLAMA = {
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOOM = {"model_type": "bloom", "vocab_size": 29, "hidden_size": 16, "n_head": 4, "n_layer": 3}
SPECS = {
    "full": AdapterSpec(method=Full()),
    "ln_tuning": AdapterSpec(method=LNTuning(), exclude_modules=("norm",)),
    "full of some": AdapterSpec(method=Full(), target_modules=("norm", "q_proj")),
    "lora": AdapterSpec(
        method=LoRA(rank=2, alpha=3.0, dropout=0.1),
        target_modules=r".*\.(q|v|up)_proj",
        exclude_modules=("v_proj",),
        rank_pattern={"up_proj": 3},
        alpha_pattern={"q_proj": 0.7},
        modules_to_save=("norm", "lm_head", "input_layernorm"),
    ),
    "lora_ga": AdapterSpec(method=LoRAGA(rank=2, direction="ArBr"), modules_to_save=("norm",)),
    "dora": AdapterSpec(method=DoRA(rank=2), rank_pattern={"q_proj": 1}),
    "lora_fa": AdapterSpec(method=LoRAFA(rank=2)),
    "lora_one": AdapterSpec(method=LoRAOne(rank=2)),
    "eva": AdapterSpec(method=EVA(rank=2)),
    "vera": AdapterSpec(method=VeRA(rank=4)),
    "randlora": AdapterSpec(method=RandLora(rank=5)),
    "fourierft": AdapterSpec(method=FourierFT(n_frequency=50)),
    "shira": AdapterSpec(method=SHiRA(rank=2)),
    "adalora": AdapterSpec(method=AdaLoRA(rank=2)),
    "pissa": AdapterSpec(method=PiSSA(rank=2), rank_pattern={"q_proj": 1}),
    "loha": AdapterSpec(method=LoHa(rank=2), alpha_pattern={"q_proj": 1.0}),
    "lokr": AdapterSpec(method=LoKr(rank=1)),
    "gralora": AdapterSpec(method=GraLoRA(rank=4, hybrid_rank=1)),
    "hira": AdapterSpec(method=HiRA(rank=2)),
    "miss": AdapterSpec(method=MiSS(rank=3)),
    "ia3": AdapterSpec(method=IA3(feedforward_modules=("down_proj",))),
    "oft": AdapterSpec(method=OFT(block_size=4)),
    "hra": AdapterSpec(method=HRA(rank=2)),
    "hra of several ranks": AdapterSpec(method=HRA(rank=2), rank_pattern={"q_proj": 4}),
    "boft": AdapterSpec(method=BOFT(block_size=4, n_butterfly_factors=1)),
    "boft two factors": AdapterSpec(method=BOFT(block_size=4)),
    "unitary": AdapterSpec(method=Unitary(), modules_to_save=("lm_head",)),
    "hybrid": AdapterSpec(
        method=Hybrid(rank=2, block_size=4, unitary_modules=("down_proj", "q_proj")),
        rank_pattern={"q_proj": 1},
        modules_to_save=("embed_tokens",),
    ),
}
IN_PEFT_FORMAT = {
    *(
        "lora",
        "lora_fa",
        "lora_one",
        "ln_tuning",
        "eva",
        "adalora",
        "lora_ga",
        "pissa",
        "loha",
        "lokr",
        "gralora",
        "hira",
        "miss",
        "ia3",
        "oft",
        "hra",
        "fourierft",
        "shira",
        "boft",
    ),
}
COPIED_FOR_PEFT = {"dora", "vera", "randlora", "boft two factors"}


@pytest.fixture(scope="module")
def model():
    return build_model(LLAMA)


@pytest.fixture(scope="module")
def params(model):
    return model.abstract_params()


@pytest.fixture
def saved(model, params, arbitrary_state, tmp_path):
    """Returns a function that saves an adapter and returns its folder and arrays."""

    def save(spec):
        state = arbitrary_state(spec, params)
        save_adapter(tmp_path / "adapter", model, spec, state, base_model_name="someone/base")
        return tmp_path / "adapter", state

    return save


def awkward(leaf: jax.Array) -> jax.Array:
    """Puts a negative zero and the smallest subnormal among the values."""
    values = np.array(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf
    values.reshape(-1)[:2] = [-0.0, jnp.finfo(leaf.dtype).smallest_subnormal]
    return jnp.asarray(values)


def assert_same_bits(found: AdapterState, expected: AdapterState) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.fast("lora_ga-float32", "dora-bfloat16", "boft two factors-float32", "hybrid-float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_every_method_is_restored_bit_for_bit(
    name, dtype, model, params, arbitrary_state, tmp_path
):
    spec = dataclasses.replace(SPECS[name], dtype=dtype)
    state = jax.tree.map(awkward, arbitrary_state(spec, params))
    save_adapter(tmp_path, model, spec, state, base_model_name="someone/base")
    found_spec, found = load_adapter(tmp_path, model, params)
    assert found_spec == spec
    assert_same_bits(found, state)
    for_peft = {"adapter_config.json", "adapter_model.safetensors"}
    own = {"peft_jax_adapter.safetensors"}
    files = {"peft_jax_adapter.json"} | (for_peft if name in IN_PEFT_FORMAT else own)
    files |= for_peft if name in COPIED_FOR_PEFT else set()
    assert {file.name for file in tmp_path.iterdir()} == files
    config = json.loads((tmp_path / "peft_jax_adapter.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"
    assert config["peft"]["loads"] == (for_peft <= files)
    if not config["peft"]["loads"]:
        assert "merged model" in config["peft"]["why"]


def test_the_files_hold_the_arrays_under_documented_names(saved):
    folder, state = saved(SPECS["hybrid"])
    tensors = safetensors.numpy.load_file(folder / "peft_jax_adapter.safetensors")
    q_proj = state.trainable["layers"]["self_attn"]["q_proj"]["kernel"]
    name = "model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(tensors[f"{name}.low_rank.a"], q_proj["low_rank"]["a"][1])
    np.testing.assert_array_equal(
        tensors[f"{name}.rotation.phases"], q_proj["rotation"]["phases"][1]
    )
    embedding = state.trainable["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], embedding)
    config = json.loads((folder / "peft_jax_adapter.json").read_text())
    assert config["method"]["name"] == "hybrid"
    assert config["method"]["rank"] == 2


def test_fully_trainable_leaves_have_the_layout_of_the_base(saved):
    folder, state = saved(SPECS["full of some"])
    tensors = safetensors.numpy.load_file(folder / "peft_jax_adapter.safetensors")
    kernel = state.trainable["layers"]["self_attn"]["q_proj"]["kernel"]
    assert set(tensors) == {
        "model.norm.weight",
        *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)),
    }
    np.testing.assert_array_equal(tensors["model.layers.2.self_attn.q_proj.weight"], kernel[2].T)


def test_lora_ga_keeps_its_scale_at_twice_the_rank(saved):
    folder, _ = saved(SPECS["lora_ga"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4
    scale = config["lora_alpha"] / math.sqrt(config["r"])
    assert scale == pytest.approx(LoRAGA(rank=2).scale, rel=1e-15)


def test_a_rotation_by_half_a_turn_has_no_peft_form(model, params, arbitrary_state, tmp_path):
    spec = SPECS["boft two factors"]
    state = arbitrary_state(spec, params)
    # Both factors rotate the first two features by a quarter turn, so the product by half a turn.
    turned = {
        path: (0.0 * leaf).at[:, :, 0, 0].set(1.0) if path[-1] == "r" else leaf
        for path, leaf in flatten(state.trainable).items()
    }
    state = AdapterState(trainable=unflatten(turned), constant={})
    save_adapter(tmp_path, model, spec, state, base_model_name="someone/base")
    config = json.loads((tmp_path / "peft_jax_adapter.json").read_text())
    assert not config["peft"]["loads"]
    assert "half a turn" in config["peft"]["why"]
    assert not (tmp_path / "adapter_config.json").exists()
    assert_same_bits(load_adapter(tmp_path, model, params)[1], state)


def test_peft_copies_above_the_size_limit_are_omitted(saved, monkeypatch):
    monkeypatch.setattr("peft_jax.hub.adapter_save.MAX_COPY_BYTES", 1000)
    folder, _ = saved(SPECS["boft two factors"])
    config = json.loads((folder / "peft_jax_adapter.json").read_text())
    assert "GiB" in config["peft"]["why"]
    assert not (folder / "adapter_model.safetensors").exists()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_failed_save_keeps_the_previous_adapter(
    saved, model, params, arbitrary_state, monkeypatch
):
    folder, _ = saved(SPECS["lora"])
    before = contents(folder)
    spec = SPECS["hybrid"]

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("peft_jax.hub.adapter_save.write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(folder, model, spec, arbitrary_state(spec, params), base_model_name="x")
    assert contents(folder) == before
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_saving_replaces_the_adapter_and_keeps_other_files(saved, model, params, arbitrary_state):
    folder, _ = saved(SPECS["lora"])
    (folder / "tokenizer.json").write_text("{}")
    spec = SPECS["unitary"]
    state = arbitrary_state(spec, params)
    save_adapter(folder, model, spec, state, base_model_name="x")
    assert set(contents(folder)) == {
        "peft_jax_adapter.json",
        "peft_jax_adapter.safetensors",
        "tokenizer.json",
    }
    assert_same_bits(load_adapter(folder, model, params)[1], state)
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_leftovers_of_a_killed_process_with_the_same_id_are_removed(tmp_path):
    folder = tmp_path / "adapter"
    left = [tmp_path / f".adapter.{os.getpid()}.{end}" for end in ("tmp", "old")]
    for path in (folder, *left):
        path.mkdir()
        (path / "stale").touch()
    with atomic_folder(folder) as new:
        (new / "fresh").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", "fresh"]


def test_folders_with_other_files_are_not_overwritten(model, params, arbitrary_state, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    spec = SPECS["unitary"]
    state = arbitrary_state(spec, params)
    with pytest.raises(ValueError, match=r"holds thesis\.tex"):
        save_adapter(tmp_path, model, spec, state, base_model_name="x")
    with pytest.raises(ValueError, match="is a file"):
        save_adapter(tmp_path / "thesis.tex", model, spec, state, base_model_name="x")


def test_arrays_that_do_not_match_the_specification_are_rejected(
    model, params, arbitrary_state, tmp_path
):
    spec = SPECS["lora"]
    state = arbitrary_state(dataclasses.replace(spec, rank_pattern={}, dtype="bfloat16"), params)
    message = r"q_proj\.kernel\.a is bfloat16 \[3, 16, 2\], not float32 \[3, 16, 2\]"
    with pytest.raises(ValueError, match=message):
        save_adapter(tmp_path, model, spec, state, base_model_name="x")
    other = dataclasses.replace(spec, target_modules=("k_proj",), exclude_modules=())
    with pytest.raises(ValueError, match=r"k_proj\.kernel\.a is missing"):
        save_adapter(
            tmp_path,
            model,
            dataclasses.replace(other, rank_pattern={}, alpha_pattern={}),
            state,
            base_model_name="x",
        )


WRONG_BASES = {
    "width": (LLAMA | {"hidden_size": 32}, r"has shape \[.*\], but must have \["),
    "fewer layers": (
        LLAMA | {"num_hidden_layers": 2},
        r"it has \S*layers\.2\.",
    ),
    "more layers": (LLAMA | {"num_hidden_layers": 4}, r"it lacks \S*layers\.3\.\S*"),
    "family": (BLOOM, r"someone/base \(llama\).*bloom model.*no module"),
    "tied": (LLAMA | {"tie_word_embeddings": True}, r"'lm_head', which matches no module"),
}


@pytest.mark.parametrize("name", ["lora", "full of some", "unitary"])
@pytest.mark.parametrize("wrong", WRONG_BASES)
def test_another_base_raises_with_the_difference(name, wrong, saved):
    config, message = WRONG_BASES[wrong]
    other = build_model(config)
    if wrong == "tied" and name == "full of some":
        pytest.skip("it does not touch the head")
    if wrong == "family" and name == "unitary":
        message = "lm_head"
    folder, _ = saved(SPECS[name])
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, other, other.abstract_params())


def test_an_error_names_the_module_whose_size_the_block_does_not_divide(saved):
    other = build_model(LLAMA | {"hidden_size": 12, "num_attention_heads": 2})
    folder, _ = saved(SPECS["boft two factors"])
    with pytest.raises(ValueError, match=r"divisible by 8, but \S*gate_proj has 12 inputs"):
        load_adapter(folder, other, other.abstract_params())


def test_damaged_and_unrelated_folders_are_rejected(saved, model, params, tmp_path):
    folder, _ = saved(SPECS["lora"])
    config = json.loads((folder / "peft_jax_adapter.json").read_text())
    del config["digests"]  # Otherwise every change below would fail the digest check.

    def check_rejected(message, **changes):
        (folder / "peft_jax_adapter.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            load_adapter(folder, model, params)

    check_rejected("format_version 2", format_version=2)
    check_rejected("'something else'", format="something else")
    check_rejected(r"arrays = 'pickle\.bin'", arrays="pickle.bin")
    check_rejected(r"rnk .*'lora'", method={"name": "lora", "rnk": 2})
    check_rejected("there is no method 'lroa'", method={"name": "lroa"})
    check_rejected(r"lacks peft_jax_adapter\.safetensors", arrays="peft_jax_adapter.safetensors")
    (folder / "peft_jax_adapter.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter(folder, model, params)
    (folder / "peft_jax_adapter.json").write_text(json.dumps(config))
    arrays = folder / "adapter_model.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated"):
        load_adapter(folder, model, params)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no adapter"):
        load_adapter(tmp_path / "empty", model, params)


def test_edited_peft_settings_are_rejected(saved, model, params):
    folder, _ = saved(SPECS["lora"])
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"lora_alpha": 99}))
    with pytest.raises(ValueError, match=r"lora_alpha is 99, not 3\b"):
        load_adapter(folder, model, params)
    # The order of modules does not matter.
    file.write_text(json.dumps(config | {"target_modules": config["target_modules"][::-1]}))
    load_adapter(folder, model, params)


def test_loading_a_model_from_an_adapter_folder_raises(saved):
    for name in ("lora", "unitary"):
        folder, _ = saved(SPECS[name])
        with pytest.raises(ValueError, match="an adapter, not a model"):
            load_model(folder)


def test_sharded_arrays_are_saved_whole(model, params, arbitrary_state, tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",))
    spec = AdapterSpec(method=LoRA(rank=8))
    state = arbitrary_state(spec, params)
    rows = jax.NamedSharding(mesh, jax.P(None, None, "fsdp"))
    spread = jax.tree.map(
        lambda leaf: jax.device_put(leaf, rows) if leaf.shape[2] % 8 == 0 else leaf, state
    )
    save_adapter(tmp_path, model, spec, spread, base_model_name="x")
    assert_same_bits(load_adapter(tmp_path, model, params)[1], state)
