"""The program of a run: model, adapter, optimiser and step, as shapes with shardings; no arrays.

It needs no weights, no data and no devices that are there: the planner compiles the same step for
devices that are not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from peft_jax.adapters import AdapterSpec, AdapterState, Hybrid
from peft_jax.core import Tree, flatten, unflatten
from peft_jax.data import AnyBatch, Batch, LabelledBatch, abstract_batch
from peft_jax.models import Model, SequenceClassifier
from peft_jax.optim import learning_rate_schedule, make_optimizer
from peft_jax.parallel import (
    LogicalAxisRules,
    batch_sharding,
    check_divides,
    cut_further,
    on_mesh,
    sharding_tree,
)
from peft_jax.training.config import RunConfig
from peft_jax.training.placement import RowPlacement
from peft_jax.training.state import TrainState, abstract_state
from peft_jax.training.step import TrainStep

_WITHIN_A_SLICE = ("tensor", "fsdp", "sequence", "data")
"""The axes of the mesh that are near, the nearest first."""

_STEPS_UNTIL_COUNTED = 1_000_000
"""Length of the schedule while epochs have not been counted in steps; no shape depends on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What a run computes with; nothing in it is large.

    Attributes:
      config: the configuration.
      steps: Number of optimizer steps, which the schedule spans.
      model: the model.
      spec: what is adapted.
      params: the model's parameters as shapes with shardings.
      constant: the adapter's constant arrays as shapes with shardings.
      state: what a step changes, as shapes with shardings.
      optimizer: turns gradients into updates.
      learning_rate: the schedule.
      mesh: the devices.
      placement: where rows of a batch go.
    """

    config: RunConfig
    steps: int
    model: Model
    spec: AdapterSpec
    params: Tree
    constant: Tree
    state: TrainState
    optimizer: optax.GradientTransformationExtraArgs
    learning_rate: Callable[[Any], Any]
    mesh: jax.sharding.Mesh
    placement: RowPlacement

    @property
    def frozen(self) -> Tree:
        """The base's parameters, without those that are trained themselves, as shapes."""
        return self.spec.frozen(self.params)

    @property
    def adapter(self) -> AdapterState:
        """The adapter's arrays, as shapes."""
        return AdapterState(trainable=self.state.trainable, constant=self.constant)

    @property
    def rows_on_a_device(self) -> int:
        """Rows of a microbatch that one device has a part of."""
        return self.config.train.microbatch_size // _parts(self.placement.rows)

    @property
    def batch_kind(self) -> type[Batch] | type[LabelledBatch]:
        """What the batches are."""
        return LabelledBatch if isinstance(self.model, SequenceClassifier) else Batch

    @property
    def batch(self) -> AnyBatch:
        """The rows of a step, cut into microbatches, as shapes with shardings."""
        train = self.config.train
        return abstract_batch(
            self.batch_kind,
            (train.gradient_accumulation, train.microbatch_size),
            train.max_length,
            self.placement.microbatches,
        )

    def lasting(self, steps: int) -> "Blueprint":
        """The same program with a schedule of `steps` steps.

        Raises:
          ValueError: the schedule does not fit into so few steps.
        """
        return dataclasses.replace(
            self,
            steps=steps,
            optimizer=optimizer_of(self.config, steps),
            learning_rate=learning_rate_schedule(self.config.optimizer, steps),
        )

    def train_step(self) -> TrainStep:
        """The step, to be compiled once."""
        return TrainStep(
            model=self.model,
            spec=self.spec,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            chunk_size=self.config.train.loss_chunk,
            seed=self.config.seed,
            shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state.trainable),
            packed=self.config.data.packing,
        )

    def trace_step(self) -> jax.stages.Traced:
        """The step as a program for these shapes; lower and compile it where it is to run."""
        everywhere = jax.NamedSharding(self.mesh, jax.P())
        jitted = jax.jit(
            self.train_step(),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, self.state), everywhere),
        )
        with on_mesh(self.mesh):
            return jitted.trace(self.state, self.frozen, self.constant, self.batch)


def draw_blueprint(
    config: RunConfig, model: Model, mesh: jax.sharding.Mesh, *, spec: AdapterSpec | None = None
) -> Blueprint:
    """The program of a run of a model on a mesh, whose devices need not be there.

    Args:
      config: the configuration.
      model: the model.
      mesh: the devices.
      spec: what is adapted; by default as the configuration says.

    Raises:
      ValueError: what is to be adapted cannot be, or the mesh does not divide the model or the
        batch; the message says what would.
    """
    spec = config.method.spec if spec is None else spec
    quantization = config.model.quantization
    platform = mesh.devices.flat[0].platform
    params = model.abstract_params(config.model.dtype, quantization, platform)
    adapter = spec.abstract(params)
    steps = config.train.steps or _STEPS_UNTIL_COUNTED
    optimizer = optimizer_of(config, steps)
    state = abstract_state(adapter.trainable, optimizer)

    rules = LogicalAxisRules()
    placement = _place_rows(mesh, rules)
    _check_rows(config, placement)
    check_divides(model.cut_sizes() | {"sequence": config.train.max_length}, mesh, rules)
    adapter_axes = spec.axes(params, model.logical_axes())
    trainable = _with_shardings(adapter.trainable, adapter_axes.trainable, mesh, rules)
    return Blueprint(
        config=config,
        steps=steps,
        model=model,
        spec=spec,
        params=_with_shardings(params, model.logical_axes(quantization), mesh, rules),
        constant=_with_shardings(adapter.constant, adapter_axes.constant, mesh, rules),
        state=_shard_state(state, trainable, optimizer, mesh),
        optimizer=optimizer,
        learning_rate=learning_rate_schedule(config.optimizer, steps),
        mesh=mesh,
        placement=placement,
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


def optimizer_of(
    config: RunConfig, steps: int = _STEPS_UNTIL_COUNTED
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a configuration, the hybrid's mixing around it.

    Args:
      config: the configuration.
      steps: Number of steps that the schedule spans; the state's shapes do not depend on it.
    """
    mixing = config.mixing if isinstance(config.method.method, Hybrid) else None
    return make_optimizer(config.optimizer, steps, mixing=mixing)


def _place_rows(mesh: jax.sharding.Mesh, rules: LogicalAxisRules) -> RowPlacement:
    rows = batch_sharding(mesh, rules)
    return RowPlacement(rows=rows, microbatches=jax.NamedSharding(mesh, jax.P(None, *rows.spec)))


def _check_rows(config: RunConfig, placement: RowPlacement) -> None:
    """Refuses batches that cannot be cut evenly."""
    train = config.train
    parts = _parts(placement.rows)
    if train.microbatch_size % parts:
        raise ValueError(
            f"train.batch_size {train.batch_size} in {train.gradient_accumulation} microbatches "
            f"makes {train.microbatch_size} rows at a time, which {parts} devices cannot share "
            f"equally; the batch size must be a multiple of {parts * train.gradient_accumulation}"
        )


def _parts(sharding: jax.sharding.NamedSharding) -> int:
    """Into how many parts the leading axis is cut.

    Example:
      >>> from peft_jax.parallel import MeshSettings, make_mesh
      >>> mesh = make_mesh(MeshSettings(devices=1))
      >>> _parts(jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
      1
    """
    axes = sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    return math.prod(sharding.mesh.shape[name] for name in names)


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
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """The state's shapes with shardings: the optimiser's are cut as what they belong to, and on.

    What is trained is repeated along the axes of the mesh that it is not cut along, because each
    device computes with it. The optimiser's state is used once a step, elementwise: each device
    updates its part, and what is gathered of the update is little beside a step's other traffic
    (Rajbhandari et al., 2020, arXiv 1910.02054, stage 1).
    """
    everywhere = jax.NamedSharding(mesh, jax.P())

    def whole(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    def as_its_own(leaf: Any, of: Any) -> Any:
        # A factored second moment has other axes than what it belongs to.
        if leaf.shape != of.shape:
            return whole(leaf)
        sharding = cut_further(of.sharding, of.shape, _WITHIN_A_SLICE)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        optimizer,
        as_its_own,
        state.opt_state,
        trainable,
        # What belongs to no parameter may be a tree of its own, as the mixing's weights are.
        transform_non_params=lambda node: jax.tree.map(whole, node),
    )
    return TrainState(step=whole(state.step), trainable=trainable, opt_state=opt_state)
