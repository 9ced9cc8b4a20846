"""Tests buckets, the number of compilations, and the end of the decoding loop."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.generation import GenerationSettings, from_tokens, generate
from peft_jax.generation.decoding import Controls, read_prompts, write_tokens
from peft_jax.generation.padded_prompts import PaddedPrompts, batch_bucket, length_bucket

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """Collects the durations of all compilations in the block."""
    found = []

    def listen(event, duration_secs, **_):
        if event == COMPILED:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_each_bucket_compiles_two_programs_once(llama):
    _, model, params = llama
    rng = np.random.default_rng(0)

    def run(lengths, **settings):
        prompts = [rng.integers(3, 61, length) for length in lengths]
        return generate(model, params, prompts, GenerationSettings(eos_ids=(), **settings))

    with compilations() as found:
        stats = run([30, 2], max_new_tokens=7).stats
    assert len(found) == 2
    assert stats.compile_seconds > 0.9 * sum(found)
    with compilations() as found:
        for length in (*range(26, 34), 1):
            shorter = int(rng.integers(1, 34))
            stats = run([shorter, max(length, 26)], max_new_tokens=int(rng.integers(1, 17))).stats
            assert stats.compile_seconds == 0
        run([27, 31, 28, 33], max_new_tokens=2, batch_size=2)
    assert not found
    with compilations() as found:
        run([33, 33], max_new_tokens=16, temperature=0.7)
        run([33, 31], max_new_tokens=5, temperature=2.0, top_k=7, seed=9)
        run([33, 31], max_new_tokens=5, temperature=2.0, top_p=0.5)
    assert len(found) == 1


@pytest.mark.parametrize("bucket", [length_bucket, batch_bucket])
def test_buckets_are_few_and_pad_little(bucket):
    sizes = [bucket(n) for n in range(1, 3000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size < 2 * max(n, 9) for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 16


def test_prompts_are_padded_on_the_left():
    padded = PaddedPrompts.of([np.arange(1, 18), np.array([20]), np.array([30, 31])])
    assert padded.tokens.shape == (4, 16)
    np.testing.assert_array_equal(padded.tokens[0], np.arange(1, 17))
    np.testing.assert_array_equal(padded.tokens[2], [*[0] * 15, 30])
    np.testing.assert_array_equal(padded.segment_ids.sum(axis=1), [16, 0, 1, 0])
    np.testing.assert_array_equal(padded.last, [17, 20, 31, 0])
    np.testing.assert_array_equal(padded.empty, [False, False, False, True])


def test_loop_ends_when_every_row_has_ended(llama, prompts):
    """With limits of 3 and 5 tokens and end tokens in the other rows, it takes 5 of 16 steps."""
    _, model, params = llama
    free = generate(model, params, prompts, GenerationSettings(max_new_tokens=20, eos_ids=()))
    firsts = {int(row.tokens[1]) for row in free.completions[2:]}
    padded = PaddedPrompts.of([np.asarray(prompt) for prompt in prompts])
    state = read_prompts(
        params,
        jnp.asarray(padded.tokens),
        jnp.asarray(padded.segment_ids),
        jnp.asarray(padded.last),
        model=model,
        new_tokens=24,
    )
    controls = Controls(
        sampling=None,
        row_keys=jnp.zeros((4, 2), jnp.uint32),
        limits=jnp.asarray([3, 5, 16, 16], jnp.int32),
        ends=jnp.asarray(np.isin(np.arange(61), list(firsts))),
    )
    state = write_tokens(
        params, state, controls, jnp.zeros(4, bool), jnp.asarray(16, jnp.int32), model=model
    )
    lengths = [
        next((n for n, token in enumerate(row.tokens, 1) if int(token) in firsts and n < cap), cap)
        for row, cap in zip(free.completions, (3, 5, 16, 16), strict=True)
    ]
    assert state.counts.tolist() == lengths
    assert int(state.step) == max(lengths) <= 5


def test_host_starts_one_loop_per_batch(llama, prompts, monkeypatch):
    _, model, params = llama
    started = []

    def counted(*args, **kwargs):
        started.append(args[1].tokens.shape)
        return write_tokens(*args, **kwargs)

    monkeypatch.setattr(from_tokens, "write_tokens", counted)
    settings = GenerationSettings(max_new_tokens=24, eos_ids=())
    generate(model, params, prompts, settings)
    assert started == [(4, 24)]
    started.clear()
    generate(model, params, prompts * 2, dataclasses.replace(settings, batch_size=4))
    assert len(started) == 2
