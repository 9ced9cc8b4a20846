"""Fuzzes `config.json`: wrong values, and malformed files."""

import json

import pytest
from fuzzing import COUNTS, JUNK, LLAMA, fuzz, outcome
from hypothesis import strategies as st

from peft_jax.core import flatten
from peft_jax.hub import read_config
from peft_jax.models import build_model

BERT = {
    "model_type": "bert",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
BLOOM = {
    "model_type": "bloom",
    "vocab_size": 300,
    "hidden_size": 16,
    "n_layer": 2,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32}
FAMILIES = [LLAMA, QWEN2, LLAMA | {"model_type": "mistral", "sliding_window": None}, BLOOM]

ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["llama3", "linear", "yarn", "dynamic", "default"]) | JUNK},
    optional={"factor": JUNK, "low_freq_factor": JUNK, "original_max_position_embeddings": JUNK},
)

changes = st.one_of(
    *(
        st.tuples(
            st.just(family),
            st.dictionaries(st.sampled_from(sorted(family)), JUNK, min_size=1, max_size=2),
        )
        for family in FAMILIES
    ),
    st.tuples(st.sampled_from(FAMILIES), st.fixed_dictionaries({"rope_scaling": ROPE})),
    st.tuples(
        st.sampled_from(FAMILIES),
        st.dictionaries(st.text(min_size=1, max_size=9), JUNK, min_size=1, max_size=1),
    ),
)


@pytest.mark.parametrize("count", COUNTS)
def test_wrong_values_are_rejected_or_build_a_model_of_the_given_sizes(tmp_path, count):
    file = tmp_path / "config.json"

    def check(change):
        family, values = change
        given = family | values
        file.write_text(json.dumps(given))
        names = (*values, "config.json", "num_heads", "head_dim")
        model, message = outcome(lambda: build_model(read_config(tmp_path)), names=names)
        if message:
            return
        shapes = {path: leaf.shape for path, leaf in flatten(model.abstract_params()).items()}
        assert all(size > 0 for shape in shapes.values() for size in shape), given
        assert model.config.vocab_size == given["vocab_size"]
        assert model.config.hidden_size == given["hidden_size"]
        layers = given.get("num_hidden_layers", given.get("n_layer"))
        assert any(shape[0] == layers for shape in shapes.values()), given

    fuzz(check, changes, count=count)


@pytest.mark.parametrize("count", COUNTS)
def test_a_malformed_configuration_is_rejected(tmp_path, count):
    file = tmp_path / "config.json"
    whole = json.dumps(LLAMA).encode()

    def check(content):
        file.write_bytes(content)
        _, message = outcome(lambda: build_model(read_config(tmp_path)))
        assert message or json.loads(content)["model_type"] == "llama"

    cut = st.integers(0, len(whole) - 1).map(lambda at: whole[:at])
    other = JUNK.map(lambda value: json.dumps(value).encode())
    deep = st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 100_000, b'{"vocab_size": ' + b"9" * 9999 + b"}"]
    )
    flipped = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)).map(
        lambda pair: whole[: pair[0]] + bytes([pair[1]]) + whole[pair[0] + 1 :]
    )
    fuzz(check, st.one_of(st.binary(max_size=40), cut, other, deep, flipped), count=count)
