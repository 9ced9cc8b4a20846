"""Tests training in memory with any loss, optimizer and devices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.adapters import AdapterSpec, Full, LoRA, LoRAGA
from peft_jax.core import flatten
from peft_jax.data import Batch
from peft_jax.models import build_model
from peft_jax.parallel import LogicalAxisRules, MeshSettings, active_rules, make_mesh, on_mesh
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
    """Returns the mean cross-entropy over targets, from full logits."""
    batch = jax.tree.map(jnp.asarray, batch)
    logits = model(bound, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.loss_mask), jnp.sum(batch.loss_mask)


def plain_loop(model, params, spec, optimizer, batches, seed=0):
    """Implements the same training without the trainer."""
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


@pytest.mark.parametrize(
    ("devices", "accumulation"),
    [
        (4, 2),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (1, 2), (4, 1))),
    ],
)
def test_trainer_agrees_with_a_plain_loop(model, params, batches, accumulation, devices):
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


def test_custom_loss_accepts_custom_batches(model, params, batches):
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


def test_hooks_are_called_when_due(model, params, batches):
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


def test_given_parameters_and_adapter_are_not_changed(model, params, batches):
    spec = AdapterSpec(LoRA(rank=2))
    before = jax.tree.map(np.array, params)
    start = spec.init(jax.random.key(5), params)
    kept = jax.tree.map(np.array, start.trainable)
    trainer = Trainer(model, spec, optax.sgd(0.1), mesh=one_device())
    training = trainer.initialize(params, adapter=start)
    trainer.step(training, batches[0])
    close(params, before, atol=0)
    close(start.trainable, kept, atol=0)


def test_gradient_initialization_needs_batches(model, params, batches):
    trainer = Trainer(model, AdapterSpec(LoRAGA(rank=2)), optax.sgd(0.1), mesh=one_device())
    with pytest.raises(ValueError, match="batches"):
        trainer.fit(params, batches)
    found = trainer.initialize(params, batches[:1]).adapter.trainable
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in flatten(found).values())


def test_step_before_initialize_is_rejected(model, params, batches):
    def trainer():
        return Trainer(model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device())

    training = trainer().initialize(params)
    with pytest.raises(ValueError, match="call initialize"):
        trainer().step(training, batches[0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda t, p, b: t.fit(p, b, steps=4), r"steps is 4\b.* 3 batches"),
        (lambda t, p, b: t.fit(p, [jax.tree.map(lambda x: x[:7], b[0])]), "a batch has 7 rows"),
        (lambda t, p, b: t.fit(p, [b[0].replace(tokens=b[0].tokens[:4])]), r"\[4, 8\]"),
    ],
)
def test_invalid_training_is_rejected(model, params, batches, act, message):
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
        (([1, 2],), "integers"),
        (([[1.5]],), "integers"),
        (([[1, 2]], [[1]]), "mask must have the shape of tokens"),
        (([[1, 2]], None, [3]), "lengths must be 1 numbers from 1 to 2"),
        (([[1, 2]], None, [0]), "lengths must be"),
        (([[1, -100]],), "tokens must be at least 0, but one is -100"),
        ((np.zeros((4, 0), int),), "at least one of each"),
    ],
)
def test_invalid_tokens_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_tokens(*arguments)


def test_padding_may_have_any_value():
    batch = Batch.from_tokens([[5, 6, -100]], lengths=[2])
    assert batch.tokens.tolist() == [[5, 6, 0]]
    assert batch.targets.tolist() == [[6, 0, 0]]


@pytest.mark.fast("method0-1")
@pytest.mark.parametrize(("method", "devices"), [(Full(), 1), (LoRA(rank=2), 2)])
def test_trained_parameters_are_copied_from_the_given_ones(model, params, batches, method, devices):
    spec = AdapterSpec(method, modules_to_save=() if method.name == "full" else ("lm_head",))
    before = jax.tree.map(np.array, params)
    mesh = make_mesh(MeshSettings(devices=devices))
    trainer = Trainer(model, spec, optax.sgd(0.1), mesh=mesh)
    training = trainer.fit(params, batches[:1])
    close(params, before, atol=0)
    trained = flatten(spec.merge(params, training.adapter))["lm_head", "kernel"]
    assert np.any(trained != before["lm_head"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_quantized_base_is_sharded_and_trained_on(batches, quantization):
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
    model, batches = build_model(CONFIG | sizes), batches[:1]
    params = model.init_params(jax.random.key(0), quantization=quantization)
    spec, optimizer = AdapterSpec(LoRA(rank=2)), optax.adam(1e-2)
    losses, _ = plain_loop(model, params, spec, optimizer, batches)
    mesh = make_mesh(MeshSettings(devices=2, fsdp=2))
    trainer, seen = Trainer(model, spec, optimizer, mesh=mesh), []
    training = trainer.fit(
        params, batches, hooks=Hooks(on_step=lambda step, m: seen.append(float(m["loss"])))
    )
    np.testing.assert_allclose(seen, losses, rtol=1e-5)
    kernel = training.frozen["layers"]["mlp"]["up_proj"]["kernel"].qvalue
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size


def of_some(params):
    """Returns a label for each parameter: the low-rank `a`s and the others."""
    return jax.tree.map_with_path(lambda path, _: "a" if path[-1].key == "a" else "b", params)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.partition({"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, of_some),
        pytest.param(optax.sm3(1e-2), marks=pytest.mark.slow),
    ],
    ids=["partition", "sm3"],
)
def test_optimizers_with_other_state_structures_work(model, params, batches, optimizer):
    spec = AdapterSpec(LoRA(rank=2))
    losses, expected = plain_loop(model, params, spec, optimizer, batches)
    mesh, seen = make_mesh(MeshSettings(devices=2)), []
    training = Trainer(model, spec, optimizer, mesh=mesh).fit(
        params, batches, hooks=Hooks(on_step=lambda step, m: seen.append(float(m["loss"])))
    )
    np.testing.assert_allclose(seen, losses, rtol=1e-5)
    close(training.adapter.trainable, expected, atol=1e-4)


def test_optimizer_can_use_the_loss(model, params, batches):
    trainer = Trainer(model, AdapterSpec(LoRA(rank=2)), optax.polyak_sgd(), mesh=one_device())
    training = trainer.initialize(params)
    before = flatten(jax.tree.map(np.array, training.adapter.trainable))
    metrics = trainer.step(training, batches[0])
    # Polyak's step size is (loss - 0) / ‖gradient‖².
    moved = sum(
        float(np.sum(np.square(leaf - before[path])))
        for path, leaf in flatten(training.adapter.trainable).items()
    )
    expected = min(1.0, float(metrics["loss"]) / float(metrics["grad_norm"]) ** 2)
    assert moved**0.5 == pytest.approx(expected * float(metrics["grad_norm"]), rel=1e-3)


def test_held_out_rows_need_not_divide_into_microbatches(model, params, batches):
    trainer = Trainer(
        model,
        AdapterSpec(LoRA(rank=2)),
        optax.sgd(0.1),
        gradient_accumulation=4,
        mesh=one_device(),
    )
    training = trainer.initialize(params)
    rows = jax.tree.map(lambda x: x[:3], batches[0])
    bound = trainer.spec.bind(params, training.adapter)
    total, weight = mean_loss(model, bound, rows)
    assert trainer.evaluate(training, [rows]) == pytest.approx(float(total / weight), rel=1e-5)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (lambda batch: jax.tree.map(lambda x: x[:3], batch), "a batch has 3 rows"),
        (lambda batch: batch.replace(loss_mask=0 * batch.loss_mask), "no batch has a target"),
    ],
)
def test_held_out_batches_are_checked_before_the_first_step(
    model, params, batches, held_out, message
):
    mesh, taken = make_mesh(MeshSettings(devices=2)), []
    trainer = Trainer(model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=mesh)
    hooks = Hooks(on_step=lambda *_: taken.append(1))
    with pytest.raises(ValueError, match=message):
        trainer.fit(params, batches, held_out=[held_out(batches[0])], hooks=hooks)
    assert not taken


def test_iterator_shared_by_both_batches_is_rejected(model, params, batches):
    trainer = Trainer(model, AdapterSpec(LoRAGA(rank=2)), optax.sgd(0.1), mesh=one_device())
    stream = iter(batches)
    with pytest.raises(ValueError, match="init_batches and batches"):
        trainer.fit(params, stream, init_batches=stream)
    assert len(list(stream)) == 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": np.zeros((8, 10), np.int32)}, "must be a Batch .*dict"),
        (Batch.from_tokens(np.full((8, 10), 32)), "tokens .* 31 .* 32"),
        (jax.tree.map(lambda x: x[:0], Batch.from_tokens(np.ones((8, 4), int))), "has 0 rows"),
    ],
)
def test_invalid_batch_is_rejected(model, params, batch, message):
    trainer = Trainer(model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device())
    with pytest.raises(ValueError, match=message):
        trainer.step(trainer.initialize(params), batch)


@pytest.mark.parametrize("batch", [{}, {"x": 3.0, "y": np.zeros((8, 2))}, {"x": [[1, 2]] * 8}])
def test_custom_loss_needs_arrays_of_rows(model, params, batch):
    trainer = Trainer(
        model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device(), loss_fn=mean_loss
    )
    with pytest.raises(ValueError, match="batch must"):
        trainer.step(trainer.initialize(params), batch)


def test_custom_loss_must_return_two_numbers(model, params, batches):
    def trained(loss_fn):
        trainer = Trainer(
            model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device(), loss_fn=loss_fn
        )
        return trainer.step(trainer.initialize(params), batches[0])["loss"]

    def total(model, bound, batch):
        return mean_loss(model, bound, batch)[0]

    expected = float(trained(lambda *given: (total(*given), jnp.float32(8))))
    assert float(trained(lambda *given: (total(*given), 8))) == pytest.approx(expected)
    with pytest.raises(ValueError, match="a loss function must return two numbers"):
        trained(total)


def test_adapter_of_another_spec_is_rejected(model, params):
    trainer = Trainer(model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device())
    for other in (AdapterSpec(LoRA(rank=4)), AdapterSpec(LoRA(rank=2), target_modules=("q_proj",))):
        adapter = other.init(jax.random.key(0), params)
        with pytest.raises(ValueError, match="AdapterSpec"):
            trainer.initialize(params, adapter=adapter)


def test_parameters_of_another_model_are_rejected(model, params):
    trainer = Trainer(model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device())
    wider = build_model(CONFIG | {"hidden_size": 32}).init_params(jax.random.key(0))
    with pytest.raises(ValueError, match=r"fit the model: .*\[.*32"):
        trainer.prepare(wider)
    with pytest.raises(ValueError, match="fit the model; missing"):
        trainer.prepare({"layers": params["layers"]})


def test_negative_numbers_of_steps_are_rejected(model, params, batches):
    trainer = Trainer(model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=one_device())
    with pytest.raises(ValueError, match="steps "):
        trainer.fit(params, batches, steps=-1)
    with pytest.raises(ValueError, match="evaluate_every "):
        Hooks(evaluate_every=-1)


RULES = {"default": None, "given": LogicalAxisRules(embed=None, tokens="sequence")}


@pytest.mark.parametrize("way", ["argument", "context"])
def test_rules_change_the_shardings_of_the_step(way, model, params, batches):
    mesh = make_mesh(MeshSettings(data=1, fsdp=2, tensor=2, devices=4))
    programs, losses, specs = {}, {}, {}
    for name, rules in RULES.items():
        with on_mesh(mesh, rules) if way == "context" else contextlib.nullcontext():
            given = rules if way == "argument" else None
            trainer = Trainer(
                model, AdapterSpec(LoRA(rank=2)), optax.sgd(0.1), mesh=mesh, rules=given
            )
        # The rules stay, also outside of the context.
        training = trainer.fit(params, batches[:1])
        program = trainer.prepare(params)
        losses[name] = trainer.evaluate(training, batches)
        rows = program.placement.put_microbatches(batches[0], 1)
        with on_mesh(mesh, rules):
            programs[name] = program.trace(rows).lower().compile().as_text()
        specs[name] = flatten(program.params)[("layers", "self_attn", "q_proj", "kernel")].sharding
    assert "fsdp" in str(specs["default"].spec)
    assert "fsdp" not in str(specs["given"].spec)
    assert programs["default"].count("all-gather") != programs["given"].count("all-gather")
    assert losses["given"] == pytest.approx(losses["default"], rel=1e-5)


def test_an_inner_context_keeps_the_rules_of_the_outer_one():
    mesh, rules = make_mesh(MeshSettings(devices=1)), LogicalAxisRules(embed=None)
    with on_mesh(mesh, rules):
        with on_mesh(mesh):
            assert active_rules() == rules
        with on_mesh(mesh, LogicalAxisRules()):
            assert active_rules() == LogicalAxisRules()
    assert active_rules() == LogicalAxisRules()
