"""Training in memory: the numbers of a plain loop, any loss, any optimizer, any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.adapters import AdapterSpec, LoRA, LoRAGA
from peft_jax.core import flatten
from peft_jax.data import Batch
from peft_jax.models import build_model
from peft_jax.parallel import MeshSettings, make_mesh
from peft_jax.training import Hooks, Trainer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return model.init_params(jax.random.key(0))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [
        Batch.from_tokens(rng.integers(0, 32, (8, 10)), lengths=rng.integers(2, 11, 8))
        for _ in range(3)
    ]


def one_device():
    return make_mesh(MeshSettings(devices=1))


def mean_loss(model, bound, batch):
    """The mean cross-entropy over targets, from whole logits."""
    batch = jax.tree.map(jnp.asarray, batch)
    logits = model(bound, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.loss_mask), jnp.sum(batch.loss_mask)


def plain_loop(model, params, spec, optimizer, batches, seed=0):
    """The same training, written without the trainer."""
    adapter = spec.init(jax.random.key(seed), params)
    trainable, state = adapter.trainable, None

    @jax.jit
    def gradients(trainable, batch):
        def loss(trainable):
            bound = spec.bind(params, adapter.replace(trainable=trainable))
            total, weight = mean_loss(model, bound, batch)
            return total / weight

        return jax.value_and_grad(loss)(trainable)

    losses = []
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(trainable)
        for batch in batches:
            value, found = gradients(trainable, batch)
            updates, state = optimizer.update(found, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
            losses.append(float(value))
    return losses, trainable


def close(found, expected, atol=2e-5):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=atol, err_msg=str(path))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("devices", [1, 4])
def test_it_takes_the_steps_of_a_plain_loop(model, params, batches, accumulation, devices):
    spec, optimizer = AdapterSpec(LoRA(rank=2)), optax.adam(1e-2)
    losses, expected = plain_loop(model, params, spec, optimizer, batches)
    trainer = Trainer(
        model,
        spec,
        optimizer,
        gradient_accumulation=accumulation,
        mesh=make_mesh(MeshSettings(devices=devices)),
    )
    seen = []
    training = trainer.fit(
        params, batches, hooks=Hooks(on_step=lambda step, m: seen.append(float(m["loss"])))
    )
    np.testing.assert_allclose(seen, losses, rtol=1e-5)
    close(training.adapter.trainable, expected)
    assert trainer.traces == 1
    assert int(training.state.step) == 3


def test_a_loss_of_ones_own_with_batches_of_ones_own(model, params, batches):
    spec, optimizer = AdapterSpec(LoRA(rank=2)), optax.sgd(0.1)
    losses, expected = plain_loop(model, params, spec, optimizer, batches)

    def loss_fn(model, bound, rows):
        return mean_loss(model, bound, rows["text"])

    trainer = Trainer(
        model, spec, optimizer, loss_fn=loss_fn, gradient_accumulation=2, mesh=one_device()
    )
    seen = []
    training = trainer.fit(
        params,
        [{"text": batch} for batch in batches],
        hooks=Hooks(on_step=lambda step, m: seen.append(float(m["loss"]))),
    )
    np.testing.assert_allclose(seen, losses, rtol=1e-5)
    close(training.adapter.trainable, expected)


def test_hooks_are_called_when_they_are_due(model, params, batches):
    trainer = Trainer(model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device())
    calls: list[tuple] = []
    hooks = Hooks(
        on_step=lambda step, metrics: calls.append(("step", step)),
        evaluate_every=2,
        on_evaluation=lambda step, loss: calls.append(("evaluation", step, loss)),
        checkpoint_every=2,
        on_checkpoint=lambda step, training: calls.append(
            ("checkpoint", step, int(training.state.step))
        ),
    )
    training = trainer.fit(params, batches, held_out=batches[:1], hooks=hooks)
    assert [call[:2] for call in calls] == [
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("checkpoint", 2),
        ("step", 3),
        ("evaluation", 3),
        ("checkpoint", 3),
    ]
    bound = trainer.spec.bind(params, training.adapter)
    total, weight = mean_loss(model, bound, batches[0])
    assert calls[-2][2] == pytest.approx(float(total / weight), rel=1e-5)
    assert calls[-1][2] == 3


def test_the_base_and_the_adapter_it_starts_from_stay_as_they_are(model, params, batches):
    spec = AdapterSpec(LoRA(rank=2))
    before = jax.tree.map(np.array, params)
    start = spec.init(jax.random.key(5), params)
    kept = jax.tree.map(np.array, start.trainable)
    trainer = Trainer(model, spec, optax.sgd(0.1), mesh=one_device())
    training = trainer.initialise(params, adapter=start)
    trainer.step(training, batches[0])
    close(params, before, atol=0)
    close(start.trainable, kept, atol=0)


def test_a_method_that_starts_along_the_gradient_wants_batches(model, params, batches):
    trainer = Trainer(model, AdapterSpec(LoRAGA(rank=2)), optax.sgd(0.1), mesh=one_device())
    with pytest.raises(ValueError, match="batches"):
        trainer.fit(params, batches)
    found = trainer.initialise(params, batches[:1]).adapter.trainable
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in flatten(found).values())


def test_a_step_comes_after_initialise(model, params, batches):
    def trainer():
        return Trainer(model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device())

    training = trainer().initialise(params)
    with pytest.raises(ValueError, match="call initialise before a step"):
        trainer().step(training, batches[0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda t, p, b: t.fit(p, b, steps=4), "the batches end after 3 of 4 steps"),
        (lambda t, p, b: t.fit(p, [jax.tree.map(lambda x: x[:7], b[0])]), "a batch has 7 rows"),
        (lambda t, p, b: t.fit(p, [{"a": b[0].tokens, "b": b[0].tokens[:4]}]), r"\[4, 8\]"),
    ],
)
def test_what_cannot_work_is_refused(model, params, batches, act, message):
    trainer = Trainer(
        model,
        AdapterSpec(LoRA(rank=2)),
        optax.sgd(0.1),
        gradient_accumulation=2,
        mesh=one_device(),
    )
    with pytest.raises(ValueError, match=message):
        act(trainer, params, batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2],), "whole numbers"),
        (([[1.5]],), "whole numbers"),
        (([[1, 2]], [[1]]), "mask must have the shape of tokens"),
        (([[1, 2]], None, [3]), "lengths must be 1 numbers from 1 to 2"),
        (([[1, 2]], None, [0]), "lengths must be"),
    ],
)
def test_tokens_that_make_no_batch_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_tokens(*arguments)
