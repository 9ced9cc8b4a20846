"""Invalid values in `config.json` raise ValueError with the attribute's name."""

import time

import pytest

from peft_jax.models import build_classifier, build_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BERT = LLAMA | {"model_type": "bert", "max_position_embeddings": 16}
BLOOM = {"model_type": "bloom", "vocab_size": 32, "hidden_size": 8, "n_layer": 2, "n_head": 2}
WRONG_SIZES = (0, -1, 2.0, "8", True, [8], {}, 2**31, 10**30)


@pytest.mark.parametrize("name", sorted(LLAMA.keys() - {"model_type"}))
@pytest.mark.parametrize("value", WRONG_SIZES, ids=repr)
def test_sizes_must_be_positive_integers(name, value):
    with pytest.raises(ValueError, match=rf"{name} ="):
        build_model(LLAMA | {name: value})
    with pytest.raises(ValueError, match=rf"{name} ="):
        build_classifier(BERT | {name: value})


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (LLAMA, {"model_type": ["llama"]}),
        (LLAMA, {"architectures": "LlamaForCausalLM"}),
        (LLAMA, {"architectures": [1]}),
        (LLAMA, {"rms_norm_eps": float("nan")}),
        (LLAMA, {"rms_norm_eps": "1e-6"}),
        (LLAMA, {"rope_theta": [1]}),
        (LLAMA, {"rope_theta": float("inf")}),
        (LLAMA, {"rope_scaling": {"type": ["linear"]}}),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": [2]}}),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": "x"}}),
        (LLAMA, {"tie_word_embeddings": "yes"}),
        (LLAMA, {"attention_bias": 1}),
        (LLAMA, {"initializer_range": -1}),
        (LLAMA, {"eos_token_id": "</s>"}),
        (LLAMA, {"eos_token_id": [1, "2"]}),
        (LLAMA, {"bos_token_id": {}}),
        (LLAMA, {"id2label": 5}),
        (LLAMA, {"torch_dtype": [1]}),
        (LLAMA | {"model_type": "qwen2"}, {"layer_types": "full_attention"}),
        (LLAMA | {"model_type": "qwen2"}, {"layer_types": ["full_attention"]}),
        (LLAMA | {"model_type": "qwen2"}, {"max_window_layers": "all"}),
        (BLOOM, {"n_layer": 10**9}),
        (BLOOM, {"n_head": 0}),
        (BLOOM, {"layer_norm_epsilon": 0}),
    ],
    ids=str,
)
def test_other_attributes_must_have_their_type_and_range(base, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=rf"config\.json.*{name}|rope param"):
        build_model(base | changes)


@pytest.mark.parametrize("value", [["gelu"], 3, {}])
def test_hidden_act_must_be_a_string(value):
    with pytest.raises(ValueError, match=r"hidden_act ="):
        build_classifier(BERT | {"hidden_act": value})


def test_a_billion_layers_are_rejected_quickly():
    start = time.process_time()
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        with pytest.raises(ValueError, match=r"num_hidden_layers = 1000000000"):
            build_model(LLAMA | {"model_type": model_type, "num_hidden_layers": 10**9})
    assert time.process_time() - start < 60


def test_long_values_are_shortened_in_messages():
    with pytest.raises(ValueError, match="more than 40 digits") as error:
        build_model(LLAMA | {"vocab_size": 10**6000})
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match=r"vocab_size = .*\.\.\.") as error:
        build_model(LLAMA | {"vocab_size": "9" * 10**6})
    assert len(str(error.value)) < 200


QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 4},
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
    ],
    ids=str,
)
def test_qwen_sliding_windows_equal_those_of_transformers(model_type, changes):
    transformers = pytest.importorskip("transformers")
    settings = LLAMA | {"num_key_value_heads": 2, "head_dim": 4} | changes
    theirs = transformers.AutoConfig.for_model(**settings | {"model_type": model_type})
    windows = [
        theirs.sliding_window if kind == "sliding_attention" else None
        for kind in theirs.layer_types
    ]
    model = build_model(settings | {"model_type": model_type})
    assert [layer.window for layer in model.config.layers] == windows
