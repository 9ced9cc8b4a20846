"""The program of a training step: model, adapter, optimizer and mesh, as shapes with shardings.

It needs no weights, no data and no devices that are there. A run's `Blueprint`, the in-memory
`Trainer`, the planner and the study all compile the step that is described here.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.adapters import AdapterSpec, AdapterState, GradientFactors
from peft_jax.core import Path, Tree, flatten, unflatten
from peft_jax.models import Model
from peft_jax.parallel import (
    LogicalAxisRules,
    batch_sharding,
    check_divides,
    on_mesh,
    shard_further,
    sharding_tree,
)
from peft_jax.training.placement import RowPlacement
from peft_jax.training.state import TrainState, abstract_state
from peft_jax.training.step import LossFn, TrainStep, call_loss, summed_loss

_WITHIN_A_SLICE = ("tensor", "fsdp", "sequence", "data")
"""Intra-slice mesh axes, fastest links first."""


@dataclasses.dataclass(kw_only=True)
class Training:
    """The arrays of a training run on the devices.

    Attributes:
      frozen: The base's parameters that are not trained.
      constant: The adapter's constant arrays.
      state: What a step changes. Each step replaces it and reuses its buffers, so that arrays taken
        from it before a step are gone after it.
    """

    frozen: Tree
    constant: Tree
    state: TrainState

    @property
    def adapter(self) -> AdapterState:
        """The adapter's arrays, as `AdapterSpec.bind`, `merge` and `save_adapter` take them."""
        return AdapterState(trainable=self.state.trainable, constant=self.constant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepProgram:
    """What a step computes with; nothing in it is large.

    Attributes:
      model: The model.
      spec: What is adapted.
      params: The model's parameters as shapes with shardings.
      constant: The adapter's constant arrays as shapes with shardings.
      state: What a step changes, as shapes with shardings.
      optimizer: Turns gradients into updates.
      learning_rate: The schedule, for the metrics; None where it is not known.
      mesh: The devices.
      placement: Where rows of a batch go.
      chunk_size: Number of positions whose logits are held at once.
      seed: Seed of dropout.
      packed: Whether rows may hold several segments.
      loss_fn: The loss; None for the model's own.
    """

    model: Model
    spec: AdapterSpec
    params: Tree
    constant: Tree
    state: TrainState
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any] | None
    mesh: jax.sharding.Mesh
    placement: RowPlacement
    chunk_size: int
    seed: int
    packed: bool
    loss_fn: LossFn | None = None

    @property
    def frozen(self) -> Tree:
        """The base's parameters that are not trained, as shapes."""
        return self.spec.frozen(self.params)

    @property
    def adapter(self) -> AdapterState:
        """The adapter's arrays, as shapes."""
        return AdapterState(trainable=self.state.trainable, constant=self.constant)

    def train_step(self) -> TrainStep:
        """Returns the step, to be compiled once."""
        return TrainStep(
            model=self.model,
            spec=self.spec,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            chunk_size=self.chunk_size,
            seed=self.seed,
            shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state.trainable),
            packed=self.packed,
            loss_fn=self.loss_fn,
        )

    def jit_step(self, step: TrainStep) -> Any:
        """Returns the jitted step; call or trace it within `on_mesh(self.mesh)`."""
        everywhere = jax.NamedSharding(self.mesh, jax.P())
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, self.state), everywhere),
        )

    def trace(self, batch: Any) -> jax.stages.Traced:
        """Traces the step for these shapes; lower and compile it where it is to run.

        Args:
          batch: The rows of a step as shapes with shardings, leaves [microbatches, rows, ...].
        """
        with on_mesh(self.mesh):
            return self.jit_step(self.train_step()).trace(
                self.state, self.frozen, self.constant, batch
            )

    def gradient_factors(
        self, key: jax.Array, params: Tree, batches: Sequence[Any]
    ) -> dict[Path, GradientFactors]:
        """Estimates the gradient's directions that adapters start along; empty where none do.

        Args:
          key: A random key.
          params: The model's parameters.
          batches: Microbatches.
        """
        placed = [self.placement.put(rows) for rows in batches]
        return self.spec.gradient_factors(
            key, params, loss_fn=self._mean_loss(batches), batches=placed
        )

    def initialize(
        self,
        key: jax.Array,
        params: Tree,
        batches: Sequence[Any] | None = None,
        *,
        factors: Mapping[Path, GradientFactors] | None = None,
    ) -> AdapterState:
        """Makes the adapter's first arrays and lays them out over the devices.

        Args:
          key: A random key.
          params: The model's parameters.
          batches: Microbatches, for methods that start along the gradient.
          factors: What `gradient_factors` returned for them, where it is known already.

        Raises:
          ValueError: The method starts along the gradient, and no batches are given.
        """
        if factors is None and batches is not None:
            factors = self.gradient_factors(key, params, batches)
        adapter = self.spec.init(key, params, factors=factors)
        # Copied: constants may share buffers with what they are the first values of, and those are
        # given away to the first step.
        constant = jax.tree.map(jnp.copy, unflatten(flatten(adapter.constant)))
        return self.place(AdapterState(trainable=adapter.trainable, constant=constant))

    def place_base(self, params: Tree) -> Tree:
        """Lays the base's parameters out over the devices.

        What is trained is copied, because the first step takes its buffers. What stays frozen is
        not, where it lies as the mesh asks.

        Args:
          params: The model's parameters.
        """
        flat, frozen = flatten(params), flatten(self.spec.frozen(params))
        return unflatten(
            {
                path: _placed(flat[path], leaf, copied=path not in frozen)
                for path, leaf in flatten(self.params).items()
            }
        )

    def place(self, adapter: AdapterState) -> AdapterState:
        """Lays an adapter's arrays out over the devices."""
        return AdapterState(
            trainable=_laid_out(adapter.trainable, self.state.trainable),
            constant=_laid_out(adapter.constant, self.constant),
        )

    def make_state(self, trainable: Tree) -> TrainState:
        """Makes the state before the first step; takes the buffers of `trainable`."""
        return self.jit_make_state()(trainable)

    def jit_make_state(self) -> Callable[[Tree], TrainState]:
        """Returns `make_state`, jitted, for whoever makes many states of one program."""
        return jax.jit(
            functools.partial(TrainState.create, optimizer=self.optimizer),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state),
            donate_argnums=0,
        )

    def _mean_loss(self, batches: Sequence[Any]) -> Callable[[Tree, Any], jax.Array]:
        """The loss of one microbatch, as its part of the mean over all of them."""
        if self.loss_fn is not None:
            loss_fn = self.loss_fn
            return lambda bound, rows: call_loss(loss_fn, self.model, bound, rows)[0]
        targets = max(sum(float(np.sum(rows.loss_mask)) for rows in batches), 1.0)

        def loss(bound: Tree, rows: Any) -> jax.Array:
            total, _ = summed_loss(
                self.model, bound, rows, chunk_size=self.chunk_size, packed=self.packed
            )
            return total / targets

        return loss


def place_rows(mesh: jax.sharding.Mesh) -> RowPlacement:
    """Returns where the rows of a batch go on a mesh."""
    rows = batch_sharding(mesh, LogicalAxisRules())
    return RowPlacement(rows=rows, microbatches=jax.NamedSharding(mesh, jax.P(None, *rows.spec)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The parameters, the adapter's constants and the state of a step, as shapes with shardings."""

    params: Tree
    constant: Tree
    state: TrainState


def lay_out(
    model: Model,
    spec: AdapterSpec,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    params: Tree,
    quantization: str = "none",
    length: int | None = None,
) -> Layout:
    """Shards what a step holds over a mesh, whose devices need not be there.

    Args:
      model: The model.
      spec: What is adapted.
      optimizer: Turns gradients into updates.
      mesh: The devices.
      params: The model's parameters, arrays or shapes.
      quantization: What the base's kernels are held as.
      length: Number of tokens of a row, which the mesh has to divide too; None if it is not known.

    Raises:
      ValueError: What is to be adapted cannot be, or the mesh does not divide the model.
    """
    rules = LogicalAxisRules()
    tokens = {} if length is None else {"sequence": length}
    check_divides(model.shardable_sizes() | tokens, mesh, rules)
    adapter = spec.abstract(params)
    axes = spec.axes(params, model.logical_axes())
    trainable = _with_shardings(adapter.trainable, axes.trainable, mesh, rules)
    state = abstract_state(adapter.trainable, optimizer)
    return Layout(
        params=_with_shardings(params, model.logical_axes(quantization), mesh, rules),
        constant=_with_shardings(adapter.constant, axes.constant, mesh, rules),
        state=_shard_state(state, trainable, mesh),
    )


def step_bytes(compiled: jax.stages.Compiled) -> int | None:
    """The bytes that a compiled step needs on each device; None where the compiler does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def _with_shardings(
    shapes: Tree, axes: Tree, mesh: jax.sharding.Mesh, rules: LogicalAxisRules
) -> Tree:
    """Shapes with the shardings that the rules make of their axes; empty branches are left out."""
    shapes, axes = unflatten(flatten(shapes)), unflatten(flatten(axes))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        sharding_tree(axes, mesh, rules, shapes),
    )


def _shard_state(
    state: TrainState,
    trainable: Tree,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """The state's shapes with shardings: the optimizer's are sharded as their parameters, and on.

    What is trained is repeated along the axes of the mesh that it is not sharded along, because
    each device computes with it. The optimizer's state is used once a step, elementwise: each
    device updates its part, and what is gathered of the update is little beside a step's other
    traffic (Rajbhandari et al., 2020, arXiv 1910.02054, stage 1).
    """
    everywhere = jax.NamedSharding(mesh, jax.P())

    def whole(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    parameters = dict(jax.tree.leaves_with_path(trainable))

    def as_its_own(path: tuple[Any, ...], leaf: Any) -> Any:
        # A state may hold what belongs to a parameter in a tree shaped like all of them, or like
        # some of them (`optax.partition`): the end of the path says which parameter it is.
        ends = (path[start:] for start in range(len(path)))
        of = next((parameters[end] for end in ends if end in parameters), None)
        # A factored second moment has other axes than what it belongs to.
        if of is None or leaf.shape != of.shape:
            return whole(leaf)
        sharding = shard_further(of.sharding, of.shape, _WITHIN_A_SLICE)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree.map_with_path(as_its_own, state.opt_state)
    return TrainState(step=whole(state.step), trainable=trainable, opt_state=opt_state)


def _laid_out(tree: Tree, abstract: Tree) -> Tree:
    """Arrays on the devices that the shapes ask for."""
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), tree, abstract)


def _placed(leaf: Any, of: Any, *, copied: bool) -> Any:
    """A parameter on the devices that its shape asks for; `QArray`s have arrays of their own."""
    there = jax.tree.map(lambda x, one: jax.device_put(x, one.sharding), leaf, of)
    return jax.tree.map(jnp.copy, there) if copied else there
