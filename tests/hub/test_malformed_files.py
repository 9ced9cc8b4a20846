"""Malformed files raise ValueError with the file's name, in one line."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from peft_jax.adapters import AdapterSpec, Hybrid, LoRA
from peft_jax.generation import ends
from peft_jax.hub import load_adapter, load_model, open_checkpoint, save_adapter, save_model
from peft_jax.hub.tensors import read_header
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import build_model
from peft_jax.runtime.files import read_json_object

LLAMA = {
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def tensor(begin, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "overlapping": ({"a": tensor(0, 16), "b": tensor(0, 16)}, 16),
    "overlapping in part": ({"a": tensor(0, 16), "b": tensor(8, 24)}, 24),
    "a hole": ({"a": tensor(0, 16), "b": tensor(20, 36)}, 36),
    "negative": ({"a": tensor(-16, 0)}, 16),
    "a name twice": (f'{{"a":{json.dumps(tensor(0, 16))},"a":{json.dumps(tensor(16, 32))}}}', 32),
    "trailing bytes": ({"a": tensor(0, 16)}, 64),
    "cut short": ({"a": tensor(0, 16)}, 15),
    "a list": ([], 0),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, 16),
    "offsets of text": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}}, 16),
    "three offsets": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, 16),
    "an unknown dtype": ({"a": tensor(0, 16, dtype="F31")}, 16),
    "another size": ({"a": tensor(0, 16, shape=(5,))}, 16),
    "a size beyond all": ({"a": tensor(0, 16, shape=(2**62, 2**62))}, 16),
    "a size of text": ({"a": tensor(0, 16, shape=("4",))}, 16),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": tensor(0, 16)}, 16),
    "nested": ("[" * 100_000, 0),
    "no json": ("{", 0),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_the_library_rejects_raise(name, tmp_path):
    header, size = HEADERS[name]
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load_file(file)
    with pytest.raises(ValueError, match=r"model\.safetensors") as found:
        read_header(file)
    assert "\n" not in str(found.value)


def test_headers_that_the_library_accepts_return_its_tensors(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.zeros((0, 3), np.float16),
        "ä": np.full((), 2.0),
    }
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    found = read_header(file)
    assert {name: one.shape for name, one in found.items()} == {
        name: value.shape for name, value in tensors.items()
    }
    (piece,) = found["b"].pieces()
    np.testing.assert_array_equal(piece[1], tensors["b"])


@pytest.mark.parametrize("value", [None, 1, ["model.safetensors"], {}])
def test_an_index_with_an_invalid_file_name_is_rejected(value, tmp_path):
    weight_map = {"model.norm.weight": "model.safetensors", "lm_head.weight": value}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 500 + "1" + "}" * 500, "\ud800", "\x00"])
def test_settings_that_cannot_be_parsed_are_rejected(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"^\S*config\.json (is not JSON|has more than)"):
        read_json_object(file)


@pytest.fixture(scope="module")
def model():
    return build_model(LLAMA)


@pytest.mark.parametrize("value", ["</s>", [1, "2"], {"a": 1}, 1.5, True])
def test_end_tokens_must_be_token_ids(value, model, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json sets eos_token_id = "):
        ends.end_tokens(model, folder=tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_error_names_a_malformed_generation_config(text, model, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json is not"):
        ends.end_tokens(model, folder=tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["[1]", "{", "5"])
def test_an_error_names_a_malformed_tokenizer_file(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is not"):
        load_tokenizer(tmp_path)


SPECS = {
    "own": AdapterSpec(method=Hybrid(rank=2, block_size=4, gradient_init=False)),
    "peft": AdapterSpec(method=LoRA(rank=2), rank_pattern={"q_proj": 1}),
}
CONFIGS = {"own": "peft_jax_adapter.json", "peft": "adapter_config.json"}


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Returns the folders of an adapter in this library's format and of one in PEFT's."""
    made = {}
    params = model.init_params(jax.random.key(0))
    for name, spec in SPECS.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        save_adapter(folder, model, spec, spec.init(jax.random.key(1), params), "base")
    (made["peft"] / CONFIGS["own"]).unlink()
    config = json.loads((made["own"] / CONFIGS["own"]).read_text())
    del config["digests"]  # Otherwise every change would fail the digest check.
    (made["own"] / CONFIGS["own"]).write_text(json.dumps(config))
    return made


ENDLESS = "(.|.)*j.x"
MALFORMED = [
    ("own", {"method": [1]}, "method must be an object"),
    ("own", {"method": {"name": ["lora"]}}, "there is no method"),
    ("own", {"method": {"name": "lora", "rank": [1]}}, "method.rank must be an integer"),
    ("own", {"method": {"name": "lora", "rank": 1000000}}, "rank is 1000000"),
    ("own", {"method": {"name": "lora", "alpha": 1e400}}, "alpha must be a finite number"),
    ("own", {"method": {"name": "boft", "n_butterfly_factors": 10**12}}, "must be at most 32"),
    ("own", {"target_modules": 5}, "target_modules must be a string"),
    ("own", {"target_modules": ENDLESS}, "takes more than 2 seconds"),
    ("own", {"exclude_modules": [None]}, r"exclude_modules.* must be a string"),
    ("own", {"rank_pattern": [1]}, "rank_pattern must be a mapping"),
    ("own", {"rank_pattern": {"(": 1}}, "is not a regular expression"),
    ("own", {"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj must be a number"),
    ("own", {"modules_to_save": 5}, "modules_to_save must be a list"),
    ("own", {"quantization": ["nf4"]}, "quantization = .'nf4'.; it must be one of none, int8"),
    ("own", {"quantization": "nf5"}, "quantization = 'nf5'; it must be one of none, int8"),
    ("peft", {"peft_type": ["LORA"]}, "peft_type"),
    ("peft", {"r": 1.5}, "r must be an integer"),
    ("peft", {"r": 1000000}, "rank is 1000000"),
    ("peft", {"lora_alpha": [1]}, "lora_alpha must be a number"),
    ("peft", {"lora_alpha": None}, "lora_alpha to null"),
    ("peft", {"r": None}, "r to null"),
    ("peft", {"lora_alpha": "16"}, "lora_alpha must be a number"),
    ("peft", {"use_rslora": "no"}, "use_rslora must be true or false"),
    ("peft", {"rank_pattern": 5}, "rank_pattern must be a mapping"),
    ("peft", {"rank_pattern": {"(": 1}}, r"'\(' is not a regular expression"),
    ("peft", {"rank_pattern": {ENDLESS: 1}}, "takes more than 2 seconds"),
    ("peft", {"alpha_pattern": {ENDLESS: 1}}, "takes more than 2 seconds"),
    ("peft", {"rank_pattern": {"q_proj": "one"}}, r"rank_pattern\.q_proj must be an integer"),
    ("peft", {"target_modules": 5}, "target_modules must be a string"),
    ("peft", {"modules_to_save": [5]}, r"modules_to_save\[0\] must be a string"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), MALFORMED, ids=str)
def test_malformed_adapters_raise_with_the_setting(kind, changes, message, folders, model):
    file = folders[kind] / CONFIGS[kind]
    text = file.read_text()
    start = time.process_time()
    try:
        file.write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(ValueError, match=message):
            load_adapter(folders[kind], model, model.abstract_params())
    finally:
        file.write_text(text)
    assert time.process_time() - start < 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_too_large_for_memory_is_rejected_before_it_is_read(dtype, model, tmp_path):
    save_model(tmp_path, model, model.init_params(jax.random.key(0)))
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {"hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 10_000}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    start = time.process_time()
    message = rf"GiB of memory, too little for the parameters in {dtype} \(\d+"
    with pytest.raises(ValueError, match=message):
        load_model(Path(tmp_path), dtype=dtype)
    assert time.process_time() - start < 60
