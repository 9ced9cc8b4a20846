"""Virtual tokens come before every sequence, however rows, layers and attention are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.core import VIRTUAL
from peft_jax.models import ExecutionSettings, build_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "head_dim": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
BLOOM = {"model_type": "bloom", "vocab_size": 31, "hidden_size": 16, "n_layer": 3, "n_head": 4}
METHODS = {
    "prompt": pj.PromptTuning(num_virtual_tokens=3),
    "prefix": pj.PrefixTuning(num_virtual_tokens=3),
}
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 8)).astype(np.int32)


def make(settings, method, **execution):
    """Returns a model, and parameters with random virtual tokens bound."""
    model = build_model(settings, ExecutionSettings(**execution))
    params = model.init_params(jax.random.key(0))
    spec = pj.AdapterSpec(method)
    state = spec.init(jax.random.key(1), params)
    return model, spec.bind(params, state)


def logits_of(model, params, tokens, segment_ids=None):
    segments = None if segment_ids is None else jnp.asarray(segment_ids)
    return model(params, jnp.asarray(tokens), segment_ids=segments)


def assert_close(found, expected):
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * size)


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.mark.fast("prefix-gemma3_text-scan_layers")
@pytest.mark.parametrize(
    "execution",
    [{"scan_layers": False}, {"remat": "full"}, {"attention": "chunked"}],
    ids=lambda one: "-".join(one),
)
@pytest.mark.parametrize("settings", [LLAMA, GEMMA, BLOOM], ids=lambda one: one["model_type"])
def test_execution_does_not_change_values_and_gradients(settings, execution, method):
    def measure(**execution):
        model, bound = make(settings, method, **execution)

        def score(virtual):
            logits = logits_of(model, bound | {VIRTUAL: virtual}, TOKENS)
            return jnp.sum(jnp.sin(logits)), logits

        (_, logits), gradient = jax.jit(jax.value_and_grad(score, has_aux=True))(bound[VIRTUAL])
        return logits, gradient

    expected, found = measure(), measure(**execution)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(expected[1]))
    jax.tree.map(assert_close, found, expected)


@pytest.mark.fast("prefix-llama")
@pytest.mark.parametrize("settings", [LLAMA, BLOOM], ids=lambda one: one["model_type"])
def test_every_packed_sequence_begins_with_the_virtual_tokens(settings, method):
    model, bound = make(settings, method)
    lengths = (3, 4)
    packed = np.concatenate([TOKENS[0, :3], TOKENS[1, :4], [0]])[None]
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    found = np.asarray(logits_of(model, bound, packed, segments))
    alone = [
        np.asarray(logits_of(model, bound, TOKENS[i : i + 1, :n]))[0] for i, n in enumerate(lengths)
    ]
    assert_close(found[0, :7], np.concatenate(alone))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [LLAMA, GEMMA, BLOOM], ids=lambda one: one["model_type"])
def test_a_cache_begins_with_the_virtual_tokens(settings, method):
    if settings is GEMMA:
        settings = GEMMA | {"sliding_window": 16}  # a cache may be padded
    model, bound = make(settings, method)
    expected = logits_of(model, bound, TOKENS)
    cache = model.start_cache(bound, 2, 8)
    states = []
    for piece in np.split(TOKENS, [5, 6], axis=1):
        hidden, cache = model.hidden_states(bound, jnp.asarray(piece), cache=cache)
        states.append(hidden)
    found = model.logits(bound, jnp.concatenate(states, axis=1))
    assert_close(found, expected)
    with pytest.raises(ValueError, match=r"3 virtual tokens.*begins with 0.*start_cache"):
        model.hidden_states(bound, jnp.asarray(TOKENS), cache=model.init_cache(2, 12))


def test_windows_that_would_count_other_texts_are_rejected(method):
    model, bound = make(GEMMA, method)
    with pytest.raises(ValueError, match=r"window of 8 tokens, but rows have 11"):
        logits_of(model, bound, TOKENS, np.ones_like(TOKENS))
    with pytest.raises(ValueError, match=r"window of 8 tokens, but rows have 35"):
        pj.generate(model, bound, [[1, 2]], pj.GenerationSettings(max_new_tokens=5))


def test_prompts_start_at_embeddings():
    model = build_model(LLAMA)
    params = model.init_params(jax.random.key(0))
    table = np.asarray(params["embed_tokens"]["embedding"])

    def start(**settings):
        spec = pj.AdapterSpec(pj.PromptTuning(num_virtual_tokens=5, **settings))
        state = spec.init(jax.random.key(1), params)
        abstract = spec.abstract(model.abstract_params())
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda x: x.shape, abstract)
        return np.asarray(state.trainable[VIRTUAL]["embeddings"])

    np.testing.assert_array_equal(start(start_tokens=(4, 2)), table[[4, 2, 4, 2, 4]])
    assert all(row in table for row in start())
    assert start(start="random").std() > 0.5
    with pytest.raises(ValueError, match="start_tokens has 31, but the model's tokens are 0 to 30"):
        start(start_tokens=(31,))


def test_trained_parameters_are_listed():
    model = build_model(LLAMA)
    params = model.init_params(jax.random.key(0))
    for method, size in zip(METHODS.values(), (3 * 16, 2 * 3 * 3 * 8), strict=True):
        spec = pj.AdapterSpec(method)
        table = pj.trainable_table(spec, params, spec.init(jax.random.key(0), params))
        assert f"trainable params: {size} " in table
        assert "virtual_tokens." in table


def test_what_makes_no_sense_is_rejected(method):
    model = build_model(LLAMA)
    params = model.init_params(jax.random.key(0))
    spec = pj.AdapterSpec(method)
    state = spec.init(jax.random.key(1), params)
    bound = spec.bind(params, state)
    with pytest.raises(ValueError, match="virtual tokens cannot be merged"):
        spec.merge(params, state)
    with pytest.raises(ValueError, match="virtual tokens already"):
        spec.bind(bound, state)
    with pytest.raises(ValueError, match=r"modules_to_save is \('lm_head',\), but must be \(\)"):
        dataclasses.replace(spec, modules_to_save=("lm_head",)).targets(params)
    with pytest.raises(ValueError, match="'mine' has virtual tokens"):
        pj.stack_adapters(params, {"mine": (spec, state)})
    with pytest.raises(ValueError, match="'mine' has virtual tokens"):
        pj.combine_adapters(params, {"mine": (spec, state)}, {"mine": 1.0}, "linear")
    with pytest.raises(ValueError, match="cannot be merged"):
        pj.approximate_by_lora(spec, params, state, rank=2)


def test_encoders_take_no_virtual_tokens(method):
    from peft_jax.models import build_classifier

    model = build_classifier(
        {
            "model_type": "bert",
            "vocab_size": 32,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 16,
        },
        num_labels=2,
    )
    params = model.init_params(jax.random.key(0))
    with pytest.raises(ValueError, match="virtual tokens"):
        pj.AdapterSpec(method).targets(params)


def test_adapters_of_kernels_go_beside_virtual_tokens(method):
    model, bound = make(LLAMA, method)
    params = {name: leaf for name, leaf in bound.items() if name != VIRTUAL}
    spec = pj.AdapterSpec(pj.LoRA(rank=2))
    state = spec.init(jax.random.key(2), params)
    state = jax.tree.map(lambda leaf: leaf + 0.1, state)
    merged = spec.merge(params, state) | {VIRTUAL: bound[VIRTUAL]}
    both = spec.bind(bound, state)
    found, expected = (logits_of(model, one, TOKENS) for one in (both, merged))
    assert_close(found, expected)
