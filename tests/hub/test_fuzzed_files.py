"""Any file content is either read or rejected with a ValueError."""

import json

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from peft_jax.adapters import AdapterSpec, Hybrid, LoRA
from peft_jax.hub import load_adapter, save_adapter
from peft_jax.hub.tensors import read_header
from peft_jax.models import build_classifier, build_model
from peft_jax.runtime.exits import explain

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": [1, 2],
}
FAMILIES = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2", "architectures": None, "sliding_window": 4},
    "bloom": {"model_type": "bloom", "vocab_size": 29, "hidden_size": 8, "n_layer": 2, "n_head": 2},
    "bert": {
        "model_type": "bert",
        "vocab_size": 29,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "id2label": {"0": "no", "1": "yes"},
    },
}

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["none", "nf4", "all-linear", "q_proj", "(", ".*", "(a+)+$", "float32"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def mutated(mapping: dict) -> st.SearchStrategy[dict]:
    """Replaces or removes one or two values of a mapping, at the top or one level down."""

    @st.composite
    def draw_one(draw):
        changed = json.loads(json.dumps(mapping))
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from(sorted(changed)))
            holder = changed
            if isinstance(changed[name], dict) and changed[name] and draw(st.booleans()):
                holder = changed[name]
                name = draw(st.sampled_from(sorted(holder)))
            if draw(st.booleans()):
                holder[name] = draw(VALUES)
            else:
                del holder[name]
            if not changed:
                break
        return changed

    return draw_one()


def fuzz(check, strategy, examples):
    """Runs a check on generated inputs, which are the same in every run."""
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(strategy)(check))()


def call_or_reject(call):
    """Returns a call's result, or None if it raises an error that commands report."""
    try:
        return call()
    except ValueError as error:
        if explain(error) is None:
            raise
        return None


MANY = [30, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", MANY)
@pytest.mark.parametrize("name", FAMILIES)
def test_any_config_json_is_read_or_rejected(name, examples):
    build = build_classifier if name == "bert" else build_model

    def check(config):
        call_or_reject(lambda: build(config).abstract_params())

    fuzz(check, mutated(FAMILIES[name]), examples)


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_safetensors_header_is_read_or_rejected(examples, tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {name: np.ones((2, 3), np.float32) for name in ("a", "b")}
    safetensors.numpy.save_file(tensors, file)
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    @st.composite
    def files(draw):
        if draw(st.booleans()):
            text = json.dumps(draw(mutated(header))).encode()
            return len(text).to_bytes(8, "little") + text + whole[8 + size :]
        damaged = bytearray(whole)
        for _ in range(draw(st.integers(1, 3))):
            damaged[draw(st.integers(0, len(damaged) - 1))] = draw(st.integers(0, 255))
        return bytes(damaged[: draw(st.integers(0, len(damaged)))])

    def check(content):
        file.write_bytes(content)
        try:
            expected = safetensors.deserialize(content)
        except safetensors.SafetensorError:
            with pytest.raises(ValueError, match=r"model\.safetensors"):
                read_header(file)
            return
        found = {name: list(tensor.shape) for name, tensor in read_header(file).items()}
        assert found == {name: value["shape"] for name, value in expected}

    fuzz(check, files(), examples)


@pytest.mark.parametrize("examples", MANY)
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_any_adapter_configuration_is_read_or_rejected(kind, examples, tmp_path):
    model = build_model(LLAMA)
    spec = {
        "own": AdapterSpec(method=Hybrid(rank=2, block_size=4, gradient_init=False)),
        "peft": AdapterSpec(method=LoRA(rank=2), rank_pattern={"q_proj": 1}),
    }[kind]
    params = model.init_params(jax.random.key(0))
    save_adapter(tmp_path, model, spec, spec.init(jax.random.key(1), params), "base")
    file = tmp_path / {"own": "peft_jax_adapter.json", "peft": "adapter_config.json"}[kind]
    if kind == "peft":
        (tmp_path / "peft_jax_adapter.json").unlink()
    config = json.loads(file.read_text())
    config.pop("digests", None)  # Otherwise every change would fail the digest check.

    def check(changed):
        file.write_text(json.dumps(changed))
        call_or_reject(lambda: load_adapter(tmp_path, model, model.abstract_params()))

    fuzz(check, mutated(config), examples)
