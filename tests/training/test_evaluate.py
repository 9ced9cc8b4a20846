"""Tests held-out metrics against full logits, one row at a time."""

import functools

import jax
import numpy as np
import pytest

from peft_jax.data import build_data
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.parallel import MeshSettings, make_mesh
from peft_jax.training.evaluate import Evaluator
from peft_jax.training.placement import RowPlacement


@pytest.fixture(scope="module")
def parts(tiny, data, checkpoint):
    from peft_jax.hub import load_model

    config = tiny(
        **{
            "data.recipe": "sst2",
            "data.path": str(data / "sentiment"),
            "data.prompt_template": "{sentence}",
            "data.completion_template": " {label}",
            "data.label_words": "bad,very good",
        }
    )
    model, params = load_model(checkpoint)
    _, held_out = build_data(
        config.data, load_tokenizer(checkpoint), batch_size=4, max_length=16, seed=0
    )
    spec = config.spec
    adapter = spec.init(jax.random.key(0), params)
    # Perturbs the adapter, so that it has an effect.
    adapter = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), adapter
    )
    mesh = make_mesh(MeshSettings(devices=2))
    placement = RowPlacement(
        rows=jax.NamedSharding(mesh, jax.P("data")),
        microbatches=jax.NamedSharding(mesh, jax.P(None, "data")),
    )
    params, adapter = jax.device_put((params, adapter), jax.NamedSharding(mesh, jax.P()))
    evaluator = Evaluator(
        model, spec, held_out, placement=placement, microbatches=2, microbatch_size=2, chunk_size=8
    )
    return model, params, spec, adapter, held_out, evaluator


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
    return model(params, tokens)


def _log_probabilities(model, params, ids):
    """Returns logits [T, V] of one sequence in float64, padded so that one program serves all."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(ids)] = ids
    logits = np.asarray(_logits(model, params, tokens), np.float64)[0, : len(ids)]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_metrics_agree_with_single_sequences(parts):
    model, params, spec, adapter, held_out, evaluator = parts
    merged = spec.merge(params, adapter)
    losses, right, correct = [], [], []
    for example in held_out.examples:
        (encoded,) = held_out.encoder.encode(example)
        log_probabilities = _log_probabilities(model, merged, encoded.ids[:-1])
        for at in np.flatnonzero(encoded.loss_mask[1:]):
            losses.append(-log_probabilities[at, encoded.ids[at + 1]])
            right.append(log_probabilities[at].argmax() == encoded.ids[at + 1])
        prompt = held_out.encoder.prompt_ids(example)
        scores = []
        for choice in held_out.encoder.choice_ids(example):
            ids = np.concatenate([prompt, choice])
            log_probabilities = _log_probabilities(model, merged, ids[:-1])
            scores.append(
                sum(log_probabilities[at - 1, ids[at]] for at in range(len(prompt), len(ids)))
            )
        correct.append(int(np.argmax(scores)) == example.label)
    measured = evaluator(params, adapter)
    assert measured["targets"] == len(losses)
    np.testing.assert_allclose(measured["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(measured["token_accuracy"], np.mean(right), rtol=1e-9)
    np.testing.assert_allclose(measured["accuracy"], np.mean(correct), rtol=1e-9)


def test_stop_ends_the_evaluation(parts):
    _, params, _, adapter, _, evaluator = parts
    asked = []

    def stop():
        asked.append(True)
        return len(asked) > 2

    assert evaluator(params, adapter, stop=stop) is None
    assert len(asked) == 3
