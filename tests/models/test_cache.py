"""Decoding with a cache agrees with a forward pass over the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "bloom": ("Bloom", {}),
}


@pytest.fixture(params=FAMILIES)
def models(request, pair):
    kind, settings = FAMILIES[request.param]
    return pair(kind, **settings)


@pytest.mark.fast("llama-left", "mistral-right", "bloom-left")
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prefill_and_steps_agree_with_the_whole_row(models, tokens, relative_error, padding):
    theirs, model, params = models
    prompt, steps, slots = 8, 5, 16
    lengths = np.array([8, 5, 1])
    index = np.arange(prompt)
    mask = index >= prompt - lengths[:, None] if padding == "left" else index < lengths[:, None]
    rows = [
        np.r_[np.asarray(row[:prompt])[kept], np.asarray(row[prompt:])]
        for row, kept in zip(tokens, mask, strict=True)
    ]
    forward = jax.jit(
        lambda tokens, segment_ids, cache: model.hidden_states(
            params, tokens, segment_ids=segment_ids, cache=cache
        )
    )
    cache = model.init_cache(3, slots)
    hidden, cache = forward(tokens[:, :prompt], jnp.asarray(mask, jnp.int32), cache)
    found = [model.logits(params, hidden[i])[mask[i]] for i in range(3)]
    for step in range(prompt, prompt + steps):
        one = jnp.ones((3, 1), jnp.int32)
        hidden, cache = forward(tokens[:, step : step + 1], one, cache)
        logits = model.logits(params, hidden)
        found = [jnp.concatenate([f, new]) for f, new in zip(found, logits, strict=True)]
    assert int(cache.length) == prompt + steps
    np.testing.assert_array_equal(cache.next_position, lengths + steps)
    if padding == "right" and theirs.module.config.model_type == "mistral":
        return  # A window counts slots, so it includes the padding between prompt and answer.
    for row, logits in zip(rows, found, strict=True):
        assert relative_error(logits, theirs.logits(row[None])[0]) < 1e-4


def test_unrolled_and_chunked_decoding_agree(pair, tokens):
    from peft_jax.models import ExecutionSettings

    _, model, params = pair("Llama", num_key_value_heads=2)
    results = []
    for settings in ({}, {"scan_layers": False, "attention": "chunked"}):
        ours = model.with_execution(ExecutionSettings(**settings))

        @jax.jit
        def decode(params, tokens, ours=ours):
            _, cache = ours.hidden_states(params, tokens[:, :9], cache=ours.init_cache(3, 13))
            return ours.hidden_states(params, tokens[:, 9:], cache=cache)

        hidden, cache = decode(params, tokens)
        results.append((hidden, cache.keys))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_may_have_another_dtype(pair, tokens, relative_error):
    theirs, model, params = pair("Llama", num_key_value_heads=2)
    cache = model.init_cache(3, 13, jnp.bfloat16)
    hidden, cache = model.hidden_states(params, tokens, cache=cache)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert relative_error(model.logits(params, hidden), theirs.logits(tokens)) < 0.05


def test_more_tokens_than_slots_are_rejected(pair, tokens):
    _, model, params = pair("Llama")
    with pytest.raises(ValueError, match=r"13 tokens .*12 slots"):
        model.hidden_states(params, tokens, cache=model.init_cache(3, 12))
