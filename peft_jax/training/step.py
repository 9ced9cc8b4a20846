"""Defines one training step and its loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.core import LOW_RANK, ROTATION, Path, Tree, flatten, is_stacked
from peft_jax.core.scopes import part
from peft_jax.data import AnyBatch, LabeledBatch
from peft_jax.models import TrainableModel
from peft_jax.optim import GroupClipping, mixing_weights
from peft_jax.parallel import constrain
from peft_jax.training.classifier_evaluation import classifier_outputs
from peft_jax.training.losses import chunked_cross_entropy
from peft_jax.training.state import TrainState

Metrics = dict[str, Any]

LossFn = Callable[[Any, Tree, Any], tuple[Float[Array, ""], Float[Array, ""]]]
"""Custom loss: maps (model, parameters with adapters bound, microbatch) to the summed losses and
the weight that divides the sum. The weight must not depend on the parameters."""

ADAPTER = "adapter"
"""Metric name of gradients of an adapter without branches."""

WEIGHTS = "weights"
"""Metric name of gradients of leaves trained in full."""


def call_loss(
    loss_fn: LossFn, model: Any, params: Tree, batch: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Calls a custom loss and returns its two numbers as float32.

    Raises:
      ValueError: The loss does not return two numbers.
    """
    found = loss_fn(model, params, batch)
    shapes = jax.tree.map(jnp.shape, found)
    if shapes != ((), ()):
        raise ValueError(
            "a loss function must return two numbers, the summed losses and the weight that divides"
            f" the sum, but returned values of the shapes {shapes}"
        )
    total, weight = found
    return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)


def summed_loss(
    model: Any, params: Tree, batch: AnyBatch, *, chunk_size: int, packed: bool = True
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the loss of a batch summed over its targets, and their number.

    Args:
      model: A `CausalLM`, or a `SequenceClassifier` for rows with labels.
      params: Parameters of the model, with adapters bound.
      batch: Rows [B, T].
      chunk_size: Number of positions whose logits are held at once.
      packed: Whether rows may have several segments; see `CausalLM.hidden_states`.

    Returns:
      Sum of losses and sum of weights, float32 []. Losses are cross-entropies in nats, or squared
      errors of a regression.
    """
    if isinstance(batch, LabeledBatch):
        _, losses = classifier_outputs(model, params, batch)
        return jnp.sum(losses), jnp.sum(batch.loss_mask)
    hidden, _ = model.hidden_states(
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        packed=packed,
    )
    # The head's vocabulary is sharded along "tensor", so its tokens cannot be.
    hidden = constrain(hidden, ("batch", "sequence", None))
    return part("loss")(chunked_cross_entropy)(
        hidden.reshape(-1, hidden.shape[-1]),
        model.head_kernel(params),
        batch.targets.reshape(-1),
        batch.loss_mask.reshape(-1),
        chunk_size=chunk_size,
        logit_rule=model.logit_rule,
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class TrainStep:
    """One optimizer step over a global batch; call it under `jax.jit`, and donate the state.

    The loss is the mean over all targets of the batch, whatever the microbatches and devices.
    Gradients are only taken with respect to `state.trainable`, never to a frozen kernel.

    Attributes:
      model: Model to train.
      spec: Specification of the adapter.
      optimizer: Optimizer that maps gradients to updates.
      learning_rate: Learning-rate schedule, for the metrics; None leaves it out of them.
      clipping: The optimizer's clipping, for the metrics; None leaves it out of them.
      chunk_size: Number of positions whose logits are held at once.
      seed: Seed of dropout.
      shardings: Shardings of trainable arrays and of their gradients; None leaves them to the
        compiler, which would shard gradients as the optimizer state and gather activations for it
        in every layer.
      packed: Whether rows may have several segments; see `CausalLM.hidden_states`.
      loss_fn: Custom loss; None for the model's own. With one, batches may be any pytree of leaves
        [rows, ...], and the metrics have no "targets" and "tokens".
      traces: Number of times the step has been traced.
    """

    model: TrainableModel
    spec: AdapterSpec
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any] | None
    chunk_size: int
    seed: int
    clipping: GroupClipping | None = None
    shardings: Tree | None = None
    packed: bool = True
    loss_fn: LossFn | None = None
    traces: int = 0

    def __call__(
        self, state: TrainState, frozen: Tree, constant: Tree, batch: Any
    ) -> tuple[TrainState, Metrics]:
        """Takes one step.

        Args:
          state: State before the step.
          frozen: Frozen parameters of the base model.
          constant: Constant arrays of the adapter.
          batch: Microbatches of the step: a `Batch` or `LabeledBatch` with leaves
            [microbatches, B, T], or the custom loss's pytree with leaves [microbatches, rows, ...].

        Returns:
          The state after the step, and its metrics: "loss" (before the update), the numbers of
          "targets" and "tokens", "grad_norm" (before clipping), "grad_norm_by_layer" (by branch,
          [layers]), "clip_factor" (by group of the clipping), "learning_rate", "lambda" (the
          hybrid's mixing weights by group) and "finite" (whether loss and gradient are).
        """
        self.traces += 1
        counts: dict[str, Any] = {}
        if self.loss_fn is None:
            targets = jnp.sum(batch.loss_mask, dtype=jnp.float32)
            counts = {
                "targets": targets.astype(jnp.int32),
                "tokens": jnp.sum(batch.segment_ids > 0, dtype=jnp.int32),
            }
            loss, gradients = self._accumulate(state, frozen, constant, batch, targets)
        else:
            loss, gradients = self._accumulate_weighted(state, frozen, constant, batch)
        if self.shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, self.shardings)
        trainable, opt_state = self._update(state, gradients, loss)
        grad_norm = part("optimizer")(optax.tree.norm)(gradients)
        if self.learning_rate is not None:
            rate = jnp.asarray(self.learning_rate(state.step), jnp.float32)
            counts["learning_rate"] = rate
        if self.clipping is not None:
            counts["clip_factor"] = self.clipping.factors(gradients)
        metrics = {
            "loss": loss,
            **counts,
            "grad_norm": grad_norm,
            "grad_norm_by_layer": norms_by_layer(gradients),
            "lambda": mixing_weights(opt_state),
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        return TrainState(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    @part("optimizer")
    def _update(self, state: TrainState, gradients: Tree, loss: Array) -> tuple[Tree, Any]:
        """Returns the trainable arrays and the optimizer's state after an update."""
        # optax's own transformations rely on implicit dtype promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optax.with_extra_args_support(self.optimizer).update(
                gradients, state.opt_state, state.trainable, value=loss
            )
        return optax.apply_updates(state.trainable, updates), opt_state

    def loss(
        self,
        trainable: Tree,
        frozen: Tree,
        constant: Tree,
        rows: AnyBatch,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, ""]:
        """Returns the differentiable loss of one microbatch [B, T], summed over its targets.

        Args:
          trainable: Trainable arrays of the adapter.
          frozen: Frozen parameters of the base model.
          constant: Constant arrays of the adapter.
          rows: Microbatch.
          dropout_key: Random key of the microbatch's dropout; None for no dropout.
        """
        bound = self._bind(trainable, frozen, constant, dropout_key)
        total, _ = summed_loss(
            self.model, bound, rows, chunk_size=self.chunk_size, packed=self.packed
        )
        return total

    def _accumulate(
        self,
        state: TrainState,
        frozen: Tree,
        constant: Tree,
        batch: AnyBatch,
        targets: Float[Array, ""],
    ) -> tuple[Float[Array, ""], Tree]:
        """Returns the mean loss over the batch and its gradient, accumulated over microbatches."""
        scale = 1.0 / jnp.maximum(targets, 1.0)

        def loss_of(trainable: Tree, rows: AnyBatch, index: Array) -> Float[Array, ""]:
            key = self._dropout_key(state, index)
            return self.loss(trainable, frozen, constant, rows, dropout_key=key) * scale

        def add(carry: Any, microbatch: tuple[AnyBatch, Array]) -> tuple[Any, None]:
            one = jax.value_and_grad(loss_of)(state.trainable, *microbatch)
            one = jax.tree.map(lambda x: x.astype(jnp.float32), one)
            return jax.tree.map(jnp.add, carry, one), None

        count = batch.tokens.shape[0]
        if count == 1:
            only = jax.tree.map(lambda x: x[0], batch)
            loss, gradients = jax.value_and_grad(loss_of)(
                state.trainable, only, jnp.zeros((), jnp.int32)
            )
            return loss, jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
        start = (jnp.zeros((), jnp.float32), zeros)
        (loss, gradients), _ = jax.lax.scan(add, start, (batch, jnp.arange(count)))
        return loss, gradients

    def _accumulate_weighted(
        self, state: TrainState, frozen: Tree, constant: Tree, batch: Any
    ) -> tuple[Float[Array, ""], Tree]:
        """Returns the mean of a custom loss and its gradient, divided after summation."""
        assert self.loss_fn is not None
        loss_fn = self.loss_fn

        def loss_of(trainable: Tree, rows: Any, index: Array) -> tuple[Array, Array]:
            key = self._dropout_key(state, index)
            bound = self._bind(trainable, frozen, constant, key)
            return call_loss(loss_fn, self.model, bound, rows)

        def add(carry: Any, microbatch: tuple[Any, Array]) -> tuple[Any, None]:
            one = jax.value_and_grad(loss_of, has_aux=True)(state.trainable, *microbatch)
            one = jax.tree.map(lambda x: x.astype(jnp.float32), one)
            return jax.tree.map(jnp.add, carry, one), None

        count = jax.tree.leaves(batch)[0].shape[0]
        zero = jnp.zeros((), jnp.float32)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
        start = ((zero, zero), zeros)
        ((total, weight), gradients), _ = jax.lax.scan(add, start, (batch, jnp.arange(count)))
        scale = 1.0 / jnp.where(weight == 0, 1.0, weight)
        return total * scale, jax.tree.map(lambda x: x * scale, gradients)

    def _bind(self, trainable: Tree, frozen: Tree, constant: Tree, key: Array | None) -> Tree:
        """Returns the parameters with the adapter bound."""
        adapter = AdapterState(trainable=trainable, constant=constant)
        remat = self.model.execution.remat != "none"
        return self.spec.bind(frozen, adapter, dropout_key=key, recompute=remat)

    def _dropout_key(self, state: TrainState, index: Array) -> Array | None:
        """Returns the dropout key of one microbatch of a step; None without dropout."""
        if not self.spec.method.has_dropout:
            return None
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        return jax.random.fold_in(key, index)


def norms_by_layer(gradients: Tree) -> dict[str, Float[Array, " layers"]]:
    """Returns Frobenius norms of the gradients of each layer, by branch.

    Args:
      gradients: Tree such as `AdapterState.trainable`.

    Returns:
      Norms [layers] by branch: "low_rank" and "rotation" of a hybrid, "adapter" of other methods,
      and "weights" of leaves trained in full. Leaves outside the layers are excluded. Those that
      only some layers have are by themselves: "adapter_3" if three layers have them.

    Example:
      >>> kernel = {"a": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.array([[4.0], [0.0]])}
      >>> norms = norms_by_layer({"layers": {"q_proj": {"kernel": kernel}}})
      >>> {branch: norm.tolist() for branch, norm in norms.items()}
      {'adapter': [5.0, 1.0]}
    """
    squares: dict[str, Array] = {}
    stacked = {path: leaf for path, leaf in flatten(gradients).items() if is_stacked(path)}
    layers = max((leaf.shape[0] for leaf in stacked.values()), default=0)
    for path, gradient in stacked.items():
        axes = tuple(range(1, gradient.ndim))
        square = jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=axes)
        rows = gradient.shape[0]
        branch = _branch(path) if rows == layers else f"{_branch(path)}_{rows}"
        squares[branch] = squares[branch] + square if branch in squares else square
    return {branch: jnp.sqrt(square) for branch, square in squares.items()}


def _branch(path: Path) -> str:
    for branch in (LOW_RANK, ROTATION):
        if branch in path:
            return branch
    return ADAPTER if "kernel" in path[:-1] else WEIGHTS
