"""Tests kept tokens against NumPy, and samples against their distribution."""

import dataclasses
from collections import Counter

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from peft_jax.generation import GenerationSettings, generate
from peft_jax.generation.sampling import Sampling, draw, keep_likeliest

VOCAB = 40
SAMPLED = GenerationSettings(max_new_tokens=20, eos_ids=(), temperature=1.0)

_keep = jax.jit(keep_likeliest)
_draw = jax.jit(draw)


def sampling(temperature=1.0, top_k=VOCAB, top_p=1.0):
    return Sampling(
        temperature=jnp.asarray(temperature, jnp.float32),
        top_k=jnp.asarray(top_k, jnp.int32),
        top_p=jnp.asarray(top_p, jnp.float32),
    )


def kept_by_numpy(logits, top_k, top_p):
    """Returns one row's mask, and the smallest distance of cumulative probabilities to `top_p`."""
    ordered = np.sort(logits.astype(np.float64))[::-1]
    mask = logits >= ordered[top_k - 1]
    kept = ordered[: mask.sum()]
    mass = np.exp(kept - kept[0])
    together = np.cumsum(mass) / mass.sum()
    if top_p < 1:
        mask &= logits >= kept[np.searchsorted(together, top_p)]
    return mask, np.abs(together - top_p).min()


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]),
    levels=st.sampled_from([2, 7, 10**6]),
    top_k=st.integers(1, VOCAB),
    top_p=st.floats(2**-10, 1.0, width=32),
)
def test_kept_tokens_agree_with_numpy(seed, spread, levels, top_k, top_p):
    rng = np.random.default_rng(seed)
    # Few levels give ties.
    logits = spread * np.round(levels * rng.normal(size=(3, VOCAB))) / levels
    logits = logits.astype(np.float32)
    found = np.asarray(_keep(jnp.asarray(logits), sampling(top_k=top_k, top_p=top_p)))
    for row, kept in zip(logits, found, strict=True):
        expected, margin = kept_by_numpy(row, top_k, top_p)
        if top_p < 1 and margin < 1e-5:
            continue  # the result depends on rounding
        np.testing.assert_array_equal(np.isfinite(kept), expected)
        np.testing.assert_array_equal(kept[expected], row[expected])


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (VOCAB, 0.8), (12, 0.6), (1, 0.5)])
def test_kept_tokens_agree_with_transformers(top_k, top_p):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(0).normal(scale=2.0, size=(20, VOCAB)).astype(np.float32)
    theirs = transformers.TopKLogitsWarper(top_k)(None, torch.tensor(logits))
    theirs = transformers.TopPLogitsWarper(top_p)(None, theirs).numpy()
    found = _keep(jnp.asarray(logits), sampling(top_k=top_k, top_p=top_p))
    np.testing.assert_array_equal(found, theirs)


def test_samples_have_the_distribution():
    count = 20_000
    logits = np.random.default_rng(1).normal(scale=1.5, size=VOCAB).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, VOCAB))
    for temperature, top_k, top_p in [(1.0, VOCAB, 1.0), (0.6, 10, 1.0), (1.7, VOCAB, 0.7)]:
        drawn = np.asarray(_draw(rows, sampling(temperature, top_k, top_p), keys))
        mask, _ = kept_by_numpy(logits / temperature, top_k, top_p)
        expected = np.where(mask, np.exp(logits.astype(np.float64) / temperature), 0.0)
        expected *= count / expected.sum()
        found = np.bincount(drawn, minlength=VOCAB)
        assert not found[~mask].any()
        assert scipy.stats.chisquare(found[mask], expected[mask]).pvalue > 0.01


def test_lowest_temperatures_are_greedy():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(50, VOCAB)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 50)
    for temperature in (1e-30, 1e-4):
        found = _draw(logits, sampling(temperature), keys)
        np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))


def sampled(model, params, prompts, **changes):
    found = generate(model, params, prompts, dataclasses.replace(SAMPLED, **changes))
    return [tuple(completion.tokens.tolist()) for completion in found.completions]


def test_sample_depends_only_on_seed_and_prompt(llama, prompts):
    _, model, params = llama
    first, second, third, fourth = sampled(model, params, prompts)
    assert [first, second, third, fourth] == sampled(model, params, prompts)
    assert sampled(model, params, [prompts[2], prompts[1], [7, 7], prompts[0]])[:2] == [
        third,
        second,
    ]
    others = sampled(model, params, prompts, seed=1)
    assert all(a != b for a, b in zip(others, (first, second, third, fourth), strict=True))
    repeated = sampled(model, params, [prompts[1]] * 4)
    assert repeated[0] == second
    assert len(set(repeated)) == 4
    greedy = sampled(model, params, prompts, temperature=0.0)
    assert sampled(model, params, prompts, top_k=1) == greedy
    assert sampled(model, params, prompts, top_p=1e-6) == greedy


def test_sampled_sequences_have_the_models_distribution(llama, prompts):
    """Samples two tokens from the three likeliest, the second given the first."""
    theirs, model, params = llama
    prompt, count, top_k, temperature = prompts[2], 1024, 3, 1.5

    def likeliest(tokens):
        powered = theirs.probabilities(tokens) ** (1 / temperature)
        best = np.argsort(powered)[-top_k:]
        return {int(token): powered[token] / powered[best].sum() for token in best}

    expected = {
        (a, b): count * p * q
        for a, p in likeliest(prompt).items()
        for b, q in likeliest([*prompt, a]).items()
    }
    found = Counter(
        sampled(
            model,
            params,
            [prompt] * count,
            max_new_tokens=2,
            temperature=temperature,
            top_k=top_k,
            batch_size=count,
        )
    )
    assert found.keys() <= expected.keys()
    counts = [found[cell] for cell in expected]
    assert scipy.stats.chisquare(counts, list(expected.values())).pvalue > 0.01


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("temperature", -0.1, "temperature .*-0.1"),
        ("temperature", float("nan"), "temperature .*nan"),
        ("temperature", float("inf"), "temperature .*inf"),
        ("top_p", 0.0, "top_p .*0.0"),
        ("top_p", 1.5, "top_p .*1.5"),
        ("top_k", 0, "top_k .* 0"),
        ("max_new_tokens", 0, "max_new_tokens .* 0"),
        ("batch_size", 0, "batch_size .* 0"),
        (
            "stop_strings",
            "Question:",
            "stop_strings .*'Question:'",
        ),
        ("stop_strings", ("",), "stop_strings .*empty"),
    ],
)
def test_invalid_settings_are_rejected(setting, value, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**{setting: value})
