"""Training, saving and combining adapters of users' Flax modules by the library's functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import peft_jax as pj
from tests.flax_models.user_modules import Encoder, NNXTransformer, moved

ROWS = np.random.default_rng(0).integers(0, 13, (8, 6))


def loss_fn(model, params, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(params, batch["tokens"]), batch["targets"]
    )
    return jnp.sum(losses), jnp.float32(losses.size)


def make(kind):
    if kind == "linen":
        return Encoder(), (Encoder().init(jax.random.key(0), ROWS), ROWS)
    module = NNXTransformer(nnx.Rngs(0))
    module.eval()
    return module, (ROWS,)


@pytest.fixture(scope="module", params=[pytest.param("linen", marks=pytest.mark.slow), "nnx"])
def trained(request):
    """A module with its adapter, trained by `Trainer` to reverse rows."""
    module, args = make(request.param)
    spec = pj.AdapterSpec(pj.LoRA(rank=4), modules_to_save=("encoder_norm",))
    if request.param == "nnx":
        spec = pj.AdapterSpec(pj.LoRA(rank=4), target_modules=r".*")
    model, params = pj.adapt(module, spec, *args)
    losses = []
    trainer = pj.Trainer(model, spec, optax.adam(3e-2), loss_fn=loss_fn)
    hooks = pj.Hooks(on_step=lambda step, metrics: losses.append(float(metrics["loss"])))
    batch = {"tokens": ROWS, "targets": ROWS[:, ::-1].copy()}
    before = jax.tree.map(np.array, params)
    training = trainer.fit(params, [batch] * 30, held_out=[batch], hooks=hooks)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.traces == 1
    return module, model, params, spec, jax.tree.map(jnp.copy, training.adapter)


def test_a_trained_adapter_is_saved_and_loaded_bit_for_bit(trained, tmp_path):
    _, model, params, spec, state = trained
    pj.save_adapter(tmp_path, model, spec, state, "a model of mine")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "peft_jax_adapter.json",
        "peft_jax_adapter.safetensors",
    ]
    loaded_spec, loaded = pj.load_adapter(tmp_path, model, params)
    assert loaded_spec == spec
    jax.tree.map(np.testing.assert_array_equal, loaded, state)


def test_a_trained_adapter_merges_into_the_users_module(trained):
    module, model, params, spec, state = trained
    merged = model.to_flax(spec.merge(params, state))
    found = merged(ROWS) if isinstance(module, nnx.Module) else module.apply(merged, ROWS)
    np.testing.assert_allclose(found, model(spec.bind(params, state), ROWS), atol=1e-4)


def test_an_adapter_of_another_module_is_refused(trained, tmp_path):
    _, model, params, spec, state = trained
    pj.save_adapter(tmp_path, model, spec, state, "a model of mine")
    other = Encoder(features=4)
    args = other.init(jax.random.key(0), ROWS), ROWS
    other_model, other_params = pj.adapt(other, None, *args)
    with pytest.raises(ValueError, match="does not fit this"):
        pj.load_adapter(tmp_path, other_model, other_params)
    (tmp_path / "peft_jax_adapter.json").unlink()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="is in Hugging Face PEFT's format"):
        pj.load_adapter(tmp_path, model, params)


@pytest.mark.slow
def test_rows_use_their_own_adapters_and_adapters_combine():
    module, args = make("linen")
    spec = pj.AdapterSpec(pj.LoRA(rank=2))
    model, params = pj.adapt(module, spec, *args)
    adapters = {
        name: (spec, moved(spec.init(jax.random.key(0), params), seed))
        for seed, name in enumerate(("one", "two"))
    }
    stacked = pj.stack_adapters(params, adapters)
    rows = stacked.rows(["one", None, "two", "one", None, None, "two", "two"])
    found = model(stacked.bind(params, rows), ROWS)
    for name in ("one", "two", None):
        number = stacked.rows([name])[0]
        alone = model(pj.bind_adapters(params, adapters, name or ()), ROWS)
        np.testing.assert_allclose(found[rows == number], alone[rows == number], atol=1e-4)
    both = model(pj.bind_adapters(params, adapters, ("one", "two")), ROWS)
    combined = pj.combine_adapters(params, adapters, {"one": 1.0, "two": 1.0}, "cat")
    summed = model(combined[0].bind(params, combined[1]), ROWS)
    np.testing.assert_allclose(both, summed, atol=1e-4)


@pytest.mark.slow
def test_full_fine_tuning_trains_every_array():
    module, args = make("linen")
    spec = pj.AdapterSpec(pj.Full())
    model, params = pj.adapt(module, spec, *args)
    trainer = pj.Trainer(model, spec, optax.adam(1e-2), loss_fn=loss_fn)
    batch = {"tokens": ROWS, "targets": ROWS}
    training = trainer.fit(params, [batch] * 2)
    merged = module.apply(model.to_flax(spec.merge(params, training.adapter)), ROWS)
    bound = model(spec.bind(training.frozen, training.adapter), ROWS)
    np.testing.assert_allclose(merged, bound, atol=1e-5)


def test_a_loss_is_needed():
    module, _ = make("nnx")
    spec = pj.AdapterSpec(pj.LoRA(rank=2))
    model, _ = pj.adapt(module, spec)
    with pytest.raises(ValueError, match="Flax module NNXTransformer has no loss of its own"):
        pj.Trainer(model, spec, optax.adam(1e-2))
