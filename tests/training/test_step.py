"""Tests the training step: gradient, accumulation and metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.adapters import AdapterSpec, AdapterState, Full, LoRA
from peft_jax.data import Batch
from peft_jax.models import build_model
from peft_jax.training import TrainState, TrainStep

VOCABULARY = 23
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def model():
    return build_model(LLAMA)


def rows(count: int, length: int = 8, seed: int = 0) -> Batch:
    """Returns random rows with padding and partial loss masks."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (count, length + 1)).astype(np.int32)
    lengths = random.integers(3, length + 1, count)
    inside = np.arange(length)[None] < lengths[:, None]
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=(inside & (random.random((count, length)) < 0.6)).astype(np.float32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)),
        segment_ids=inside.astype(np.int32),
    )


def microbatches(batch: Batch, count: int) -> Batch:
    return jax.tree.map(lambda x: jnp.asarray(x.reshape(count, -1, *x.shape[1:])), batch)


@dataclasses.dataclass
class Setup:
    """Returns a step of gradient descent at rate 1, whose update is the negative gradient."""

    step: TrainStep
    state: TrainState
    frozen: dict
    constant: dict
    params: dict
    spec: AdapterSpec

    def take(self, batch: Batch):
        return jax.jit(self.step)(self.state, self.frozen, self.constant, batch)


def setup(model, method, *, seed: int = 0, **settings) -> Setup:
    params = model.init_params(jax.random.key(1))
    spec = AdapterSpec(method=method, **settings)
    adapter = spec.init(jax.random.key(2), params)
    # Perturbs the adapter, because LoRA's A has no gradient initially.
    trainable = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), adapter.trainable
    )
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    step = TrainStep(
        model=model,
        spec=spec,
        optimizer=optimizer,
        learning_rate=lambda step: 0.5 + step.astype(jnp.float32),
        chunk_size=16,
        seed=seed,
    )
    return Setup(
        step=step,
        state=TrainState.create(trainable, optimizer),
        frozen=spec.frozen(params),
        constant=adapter.constant,
        params=params,
        spec=spec,
    )


def reference(model, setup: Setup, batch: Batch):
    """Returns the mean loss from full logits and its gradient, without the step's code."""

    @jax.jit
    def loss(trainable, frozen, constant, batch):
        bound = setup.spec.bind(frozen, AdapterState(trainable=trainable, constant=constant))
        logits = model(
            bound, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.sum(losses * batch.loss_mask) / jnp.sum(batch.loss_mask)

    batch = jax.tree.map(jnp.asarray, batch)
    return jax.value_and_grad(loss)(setup.state.trainable, setup.frozen, setup.constant, batch)


@pytest.mark.fast("LoRA*")
@pytest.mark.parametrize(
    ("method", "count"),
    [
        (LoRA(rank=2), 3),
        (Full(), 1),
        *(
            pytest.param(method, count, marks=pytest.mark.slow)
            for method, count in ((LoRA(rank=2), 1), (LoRA(rank=2), 2), (Full(), 2), (Full(), 3))
        ),
    ],
    ids=str,
)
def test_step_descends_the_gradient_of_the_mean_over_targets(model, method, count):
    made = setup(model, method)
    batch = rows(6)
    # Microbatches must differ in their number of targets, to detect equal weighting.
    parts = batch.loss_mask.reshape(count, -1).sum(axis=1)
    assert count == 1 or len(set(parts.tolist())) > 1
    loss, gradients = reference(model, made, batch)
    state, metrics = made.take(microbatches(batch, count))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-4)
    jax.tree.map(
        lambda before, after, gradient: np.testing.assert_allclose(
            before - after, gradient, rtol=1e-3, atol=2e-6
        ),
        made.state.trainable,
        state.trainable,
        gradients,
    )
    assert int(metrics["targets"]) == int(batch.loss_mask.sum())
    assert int(metrics["tokens"]) == int((batch.segment_ids > 0).sum())
    assert int(state.step) == 1
    np.testing.assert_allclose(metrics["learning_rate"], 0.5)


def test_norms_by_layer_agree_with_each_layer(model):
    made = setup(model, LoRA(rank=2))
    batch = rows(4)
    _, gradients = reference(model, made, batch)
    _, metrics = made.take(microbatches(batch, 1))
    for layer in range(2):
        of_layer = optax.tree.norm(jax.tree.map(lambda x, at=layer: x[at], gradients["layers"]))
        np.testing.assert_allclose(
            metrics["grad_norm_by_layer"]["adapter"][layer], of_layer, rtol=1e-4
        )


def test_no_gradient_of_a_frozen_kernel_is_computed(model):
    """With a frozen base model no product has the shape of a base kernel."""
    made = setup(model, LoRA(rank=2), target_modules=("up_proj",))
    jaxpr = jax.make_jaxpr(made.step)(
        made.state, made.frozen, made.constant, microbatches(rows(4), 1)
    )
    whole = jax.make_jaxpr(setup(model, Full()).step)(
        *_arguments(setup(model, Full())), microbatches(rows(4), 1)
    )
    assert (24, 16) not in _product_shapes(jaxpr)
    assert (24, 16) in _product_shapes(whole)  # the check finds them where they are


def _arguments(made: Setup):
    return made.state, made.frozen, made.constant


def _product_shapes(jaxpr) -> set[tuple[int, ...]]:
    """Yields the shapes of all matrix products, also in inner functions."""
    shapes = set()
    pending = [jaxpr.jaxpr]
    while pending:
        inner = pending.pop()
        for equation in inner.eqns:
            if equation.primitive.name == "dot_general":
                shapes |= {variable.aval.shape for variable in equation.outvars}
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                if hasattr(value, "jaxpr"):
                    pending.append(value.jaxpr)
                elif hasattr(value, "eqns"):
                    pending.append(value)
    return shapes


def test_batch_without_targets_does_not_divide_by_zero(model):
    made = setup(model, LoRA(rank=2))
    batch = rows(2)
    batch = batch.replace(loss_mask=np.zeros_like(batch.loss_mask))
    state, metrics = made.take(microbatches(batch, 1))
    assert float(metrics["loss"]) == 0.0
    assert bool(metrics["finite"])
    jax.tree.map(np.testing.assert_array_equal, made.state.trainable, state.trainable)


@pytest.mark.slow
def test_dropout_depends_only_on_seed_and_step(model):
    batch = microbatches(rows(4), 2)

    def losses(seed, steps):
        made = setup(model, LoRA(rank=2, dropout=0.5), seed=seed)
        step, state, out = jax.jit(made.step), made.state, []
        for _ in range(steps):
            new, metrics = step(state, made.frozen, made.constant, batch)
            state = state.replace(step=new.step)  # the arrays stay: only the masks differ
            out.append(float(metrics["loss"]))
        return out

    first, again, other = losses(0, 3), losses(0, 3), losses(1, 3)
    assert first == again
    assert len({*first, *other}) == 6
