"""Runs with LoftQ read the kernels before they were quantized from the checkpoint."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import peft_jax as pj
from peft_jax.core import flatten
from peft_jax.hub import original_kernels, save_adapter
from peft_jax.models import quantization_of
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.prepare import prepare

BASE = Path(__file__).parents[2] / "assets" / "tiny_world"
SPEC = pj.AdapterSpec(pj.LoftQ(rank=2), target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def quantized():
    return pj.load_model(BASE, dtype="float32", quantization="nf4")


@pytest.fixture(scope="module")
def originals():
    return pj.load_model(BASE, dtype="float32")[1]


def test_kernels_are_read_from_the_checkpoint(quantized, originals):
    model, params = quantized
    read = original_kernels(model)
    for path in SPEC.targets(params).adapted:
        for layer in range(model.config.num_layers):
            np.testing.assert_array_equal(read(path, (layer,)), flatten(originals)[path][layer])


def test_a_trainer_starts_from_the_checkpoint(quantized, originals):
    model, params = quantized
    training = pj.Trainer(model, SPEC, optax.adam(1e-3)).initialize(params)
    expected = SPEC.init(jax.random.key(0), params, originals=originals)
    jax.tree.map(np.testing.assert_array_equal, training.state.trainable, expected.trainable)
    unknown = dataclasses.replace(model, origin="")
    with pytest.raises(ValueError, match="checkpoint of the model is not known"):
        pj.Trainer(unknown, SPEC, optax.adam(1e-3)).initialize(params)


@pytest.mark.slow
def test_the_merged_model_has_the_quantized_base(quantized, originals, tmp_path):
    model, params = quantized
    state = SPEC.init(jax.random.key(0), params, originals=originals)
    folder = tmp_path / "adapter"
    save_adapter(folder, model, SPEC, state, str(BASE), quantization=quantization_of(params))
    pj.export_adapter(folder, tmp_path / "merged", dtype="float32")
    _, found = pj.load_model(tmp_path / "merged", dtype="float32")
    expected = SPEC.merge(params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "model.quantization is 'none'"), ({"weights": "random"}, "model.weights is 'random'")],
    ids=["none", "random"],
)
def test_a_run_without_errors_to_correct_is_rejected(settings, message, tiny):
    changes = {f"model.{name}": value for name, value in settings.items()}
    if changes:
        changes["model.quantization"] = "nf4"
    config = tiny(**{"method.name": "loftq"}, **changes)
    with pytest.raises(RefusedError, match=message):
        prepare(config, say=print)
