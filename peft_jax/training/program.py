"""Defines the program of a training step as shapes with shardings.

It needs no weights and no data, and its devices need not be present. A run's `Blueprint`, the
in-memory `Trainer`, the planner and the study all compile this step.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.adapters.input_sketch import trace_inputs
from peft_jax.adapters.method import StartFactors
from peft_jax.adapters.sketch import trace_pass
from peft_jax.core import Path, Tree, flatten, unflatten
from peft_jax.data import Batch, LabeledBatch
from peft_jax.hub import original_kernels
from peft_jax.models import TrainableModel
from peft_jax.optim import GroupClipping, evaluated_arrays
from peft_jax.parallel import (
    LogicalAxisRules,
    active_rules,
    async_collective_options,
    batch_sharding,
    check_divides,
    on_mesh,
    shard_further,
    sharding_tree,
)
from peft_jax.training.placement import RowPlacement
from peft_jax.training.state import TrainState, abstract_state
from peft_jax.training.step import LossFn, TrainStep, call_loss, summed_loss

_WITHIN_A_SLICE = ("tensor", "fsdp", "expert", "sequence", "data")
"""Intra-slice mesh axes, fastest links first."""


@dataclasses.dataclass(kw_only=True)
class Training:
    """Arrays of a training run on the devices.

    Attributes:
      frozen: Frozen parameters of the base model.
      constant: Constant arrays of the adapter.
      state: Trainable arrays and optimizer state. Each step replaces it and donates its buffers. A
        step deletes arrays that were read from the state before it.
    """

    frozen: Tree
    constant: Tree
    state: TrainState

    @property
    def adapter(self) -> AdapterState:
        """Arrays of the adapter, for `AdapterSpec.bind`, `merge` and `save_adapter`.

        After steps of a schedule-free optimizer they are its averages; see `evaluated_arrays`.
        """
        trainable = evaluated_arrays(self.state.opt_state, self.state.trainable)
        return AdapterState(trainable=trainable, constant=self.constant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepProgram:
    """Program of a training step; it holds no large arrays.

    Attributes:
      model: Model to train.
      spec: Specification of the adapter.
      params: Model parameters, as shapes with shardings.
      constant: Constant arrays of the adapter, as shapes with shardings.
      state: Trainable arrays and optimizer state, as shapes with shardings.
      optimizer: Optimizer that maps gradients to updates.
      learning_rate: Learning-rate schedule, for the metrics; None if unknown.
      mesh: Mesh of devices.
      placement: Sharding of batch rows.
      chunk_size: Number of positions whose logits are held at once.
      seed: Seed of dropout.
      packed: Whether rows may have several segments.
      loss_fn: Custom loss; None for the model's own.
      clipping: The optimizer's clipping, for the metrics; None if unknown.
      init_passes: Number of passes of `start_factors`.
    """

    model: TrainableModel
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
    clipping: GroupClipping | None = None
    init_passes: int = 1

    @property
    def frozen(self) -> Tree:
        """Frozen parameters of the base model, as shapes."""
        return self.spec.frozen(self.params)

    @property
    def adapter(self) -> AdapterState:
        """Arrays of the adapter, as shapes."""
        return AdapterState(trainable=self.state.trainable, constant=self.constant)

    def train_step(self) -> TrainStep:
        """Returns the step, to compile once."""
        return TrainStep(
            model=self.model,
            spec=self.spec,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            clipping=self.clipping,
            chunk_size=self.chunk_size,
            seed=self.seed,
            shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state.trainable),
            packed=self.packed,
            loss_fn=self.loss_fn,
        )

    def jit_step(self, step: TrainStep) -> Any:
        """Returns the jitted step; call or trace it inside `on_mesh(self.mesh)`."""
        everywhere = jax.NamedSharding(self.mesh, jax.P())
        transfers = self.model.execution.async_collectives
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, self.state), everywhere),
            compiler_options=async_collective_options(self.mesh) if transfers else None,
        )

    def trace(self, batch: Any) -> jax.stages.Traced:
        """Traces the step for these shapes; lower and compile the result.

        Args:
          batch: Rows of a step as shapes with shardings, leaves [microbatches, rows, ...].
        """
        with on_mesh(self.mesh):
            return self.jit_step(self.train_step()).trace(
                self.state, self.frozen, self.constant, batch
            )

    def start_factors(
        self, key: jax.Array, params: Tree, batches: Sequence[Any]
    ) -> dict[Path, StartFactors]:
        """Returns the factors that initialize adapters; empty if the method needs none.

        Programs with equal models, ranks and batch shapes share one compiled pass.

        Args:
          key: Random key.
          params: Model parameters.
          batches: Microbatches.
        """
        share = np.float32(1.0 / self._weight(batches))
        placed = [(self.placement.put(rows), share) for rows in batches]
        return self.spec.start_factors(
            key, params, loss_fn=self.start_loss, batches=placed, passes=self.init_passes
        )

    @property
    def start_loss(self) -> "StartLoss":
        """Loss whose gradient, or whose kernels' inputs, initialize adapters."""
        return StartLoss(
            model=self.model,
            chunk_size=self.chunk_size,
            packed=self.packed,
            loss_fn=self.loss_fn,
        )

    def trace_start(self, rows: Any) -> jax.stages.Traced:
        """Traces a pass of `start_factors`; lower and compile the result.

        Args:
          rows: One microbatch as shapes with shardings, leaves [rows, ...].

        Raises:
          ValueError: The method does not start from batches.
        """
        ranks = self.spec.start_ranks(self.params)
        if not ranks:
            raise ValueError(f"{self.spec.method.name} does not start from batches")
        batch = (rows, jax.ShapeDtypeStruct((), jnp.float32))
        with on_mesh(self.mesh):
            if self.spec.method.input_rank:
                return trace_inputs(self.start_loss, self.params, ranks, batch)
            return trace_pass(self.start_loss, self.params, ranks, batch, passes=self.init_passes)

    def initialize(
        self,
        key: jax.Array,
        params: Tree,
        batches: Sequence[Any] | None = None,
        *,
        factors: Mapping[Path, StartFactors] | None = None,
    ) -> AdapterState:
        """Initializes the adapter's arrays, sharded over the devices.

        Args:
          key: Random key.
          params: Model parameters.
          batches: Microbatches for methods that initialize from them.
          factors: Result of `start_factors` for the batches, if it is known already.

        Raises:
          ValueError: The method needs batches, and none are given.
        """
        if factors is None and batches is not None:
            factors = self.start_factors(key, params, batches)
        originals = None
        if self.spec.method.corrects_quantization:
            originals = original_kernels(self.model)
        adapter = self.spec.init(key, params, factors=factors, originals=originals)
        # Constants may share buffers with trainable arrays, which the first step donates.
        constant = jax.tree.map(jnp.copy, unflatten(flatten(adapter.constant)))
        return self.place(AdapterState(trainable=adapter.trainable, constant=constant))

    def place_base(self, params: Tree) -> Tree:
        """Shards the base model's parameters over the devices.

        Leaves trained in full are copied, because the first step donates their buffers. Frozen
        leaves with the right sharding are not copied.

        Args:
          params: Model parameters.
        """
        flat, frozen = flatten(params), flatten(self.spec.frozen(params))
        return unflatten(
            {
                path: _placed(flat[path], leaf, copied=path not in frozen)
                for path, leaf in flatten(self.params).items()
            }
        )

    def place(self, adapter: AdapterState) -> AdapterState:
        """Shards an adapter's arrays over the devices."""
        return AdapterState(
            trainable=_laid_out(adapter.trainable, self.state.trainable),
            constant=_laid_out(adapter.constant, self.constant),
        )

    def make_state(self, trainable: Tree) -> TrainState:
        """Returns the state before the first step; donates the buffers of `trainable`."""
        return self.jit_make_state()(trainable)

    def jit_make_state(self) -> Callable[[Tree], TrainState]:
        """Returns `make_state` as a jitted function, for many states of one program."""
        return jax.jit(
            functools.partial(TrainState.create, optimizer=self.optimizer),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state),
            donate_argnums=0,
        )

    def _weight(self, batches: Sequence[Any]) -> float:
        """Returns the number of targets of all batches; 1 for a custom loss, which has its own."""
        if self.loss_fn is not None:
            return 1.0
        return max(sum(float(np.sum(rows.loss_mask)) for rows in batches), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartLoss:
    """Loss of one microbatch as its share of the mean over several.

    It is a value and not a closure, so that programs that differ in nothing else share what is
    compiled for it.

    Attributes:
      model: Model.
      chunk_size: Number of positions whose logits are held at once.
      packed: Whether rows may have several segments.
      loss_fn: Custom loss; None for the model's own.
    """

    model: TrainableModel
    chunk_size: int
    packed: bool
    loss_fn: LossFn | None

    def __call__(self, bound: Tree, batch: tuple[Any, jax.Array]) -> jax.Array:
        """Returns the summed loss of (rows, share), times the share."""
        rows, share = batch
        if self.loss_fn is not None:
            total, _ = call_loss(self.loss_fn, self.model, bound, rows)
        else:
            total, _ = summed_loss(
                self.model, bound, rows, chunk_size=self.chunk_size, packed=self.packed
            )
        return total * share

    def counted(self, batch: tuple[Any, jax.Array]) -> jax.Array | None:
        """Returns a mask of the positions that the loss is about; None for all.

        Those are the positions with a target or, in a classifier, the tokens of rows with a label.
        """
        rows, _ = batch
        if isinstance(rows, Batch):
            return rows.loss_mask > 0
        if isinstance(rows, LabeledBatch):
            return (rows.segment_ids > 0) & (rows.loss_mask > 0)[:, None]
        return None


def place_rows(mesh: jax.sharding.Mesh) -> RowPlacement:
    """Returns the shardings of batch rows on a mesh, by the rules of the enclosing `on_mesh`."""
    rows = batch_sharding(mesh, active_rules())
    return RowPlacement(rows=rows, microbatches=jax.NamedSharding(mesh, jax.P(None, *rows.spec)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Parameters, adapter constants and state of a step, as shapes with shardings."""

    params: Tree
    constant: Tree
    state: TrainState


def lay_out(
    model: TrainableModel,
    spec: AdapterSpec,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    params: Tree,
    quantization: str = "none",
    length: int | None = None,
) -> Layout:
    """Shards the arrays of a step over a mesh, whose devices need not be present.

    The rules are those of the enclosing `on_mesh`, or the defaults.

    Args:
      model: Model to train.
      spec: Specification of the adapter.
      optimizer: Optimizer that maps gradients to updates.
      mesh: Mesh of devices.
      params: Model parameters, arrays or shapes.
      quantization: Quantization of the base model's kernels.
      length: Number of tokens of a row, which the mesh must divide too; None if unknown.

    Raises:
      ValueError: A module cannot be adapted, or the mesh does not divide the model.
    """
    rules = active_rules()
    tokens = {} if length is None else {"sequence": length}
    check_divides(model.shardable_sizes() | tokens, mesh, rules)
    adapter = spec.abstract(params)
    model.check_virtual(adapter.trainable)
    axes = spec.axes(params, model.logical_axes())
    trainable = _with_shardings(adapter.trainable, axes.trainable, mesh, rules)
    state = abstract_state(adapter.trainable, optimizer)
    return Layout(
        params=_with_shardings(params, model.logical_axes(quantization), mesh, rules),
        constant=_with_shardings(adapter.constant, axes.constant, mesh, rules),
        state=_shard_state(state, trainable, mesh),
    )


def step_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes that a compiled step needs on each device; None if unknown."""
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
    """Returns shapes with shardings by the rules, without empty branches."""
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
    """Returns the state's shapes with shardings; optimizer state is sharded over all mesh axes.

    Trainable arrays are replicated along mesh axes that do not shard them, because each device
    computes with them. The optimizer state is only used elementwise, once per step. So each device
    updates a shard, and gathering the updates adds little to a step's other traffic (Rajbhandari et
    al., 2020, arXiv 1910.02054, stage 1).
    """
    everywhere = jax.NamedSharding(mesh, jax.P())

    def whole(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    parameters = dict(jax.tree.leaves_with_path(trainable))

    def as_its_own(path: tuple[Any, ...], leaf: Any) -> Any:
        # A state may contain trees shaped like all parameters or like some (`optax.partition`). The
        # end of a path names the parameter.
        ends = (path[start:] for start in range(len(path)))
        of = next((parameters[end] for end in ends if end in parameters), None)
        # A factored second moment has other axes than its parameter.
        if of is None or leaf.shape != of.shape:
            return whole(leaf)
        sharding = shard_further(of.sharding, of.shape, _WITHIN_A_SLICE)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree.map_with_path(as_its_own, state.opt_state)
    return TrainState(step=whole(state.step), trainable=trainable, opt_state=opt_state)


def _laid_out(tree: Tree, abstract: Tree) -> Tree:
    """Puts arrays on devices with the shardings of the shapes."""
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), tree, abstract)


def _placed(leaf: Any, of: Any, *, copied: bool) -> Any:
    """Puts a parameter, which may be a `QArray`, on devices with its sharding."""
    there = jax.tree.map(lambda x, one: jax.device_put(x, one.sharding), leaf, of)
    return jax.tree.map(jnp.copy, there) if copied else there
