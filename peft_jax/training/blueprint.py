"""Builds the program of a run from its configuration, without weights and data."""

import dataclasses
from collections.abc import Sequence

import jax
import optax

from peft_jax.adapters import AdapterSpec
from peft_jax.data import AnyBatch, Batch, LabeledBatch, abstract_batch
from peft_jax.models import Model, SequenceClassifier
from peft_jax.optim import learning_rate_schedule, make_optimizer
from peft_jax.training.config import RunConfig
from peft_jax.training.placement import RowPlacement
from peft_jax.training.program import StepProgram, lay_out, place_rows

_STEPS_UNTIL_COUNTED = 1_000_000
"""Schedule length while the steps of an epoch are unknown; no shape depends on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blueprint(StepProgram):
    """Program of a run; it holds no large arrays.

    Attributes:
      model: Model to train, which a run reads from a checkpoint or a configuration.
      config: Configuration of the run.
      steps: Number of optimizer steps, which the schedule spans.
    """

    model: Model
    config: RunConfig
    steps: int

    @property
    def rows_on_a_device(self) -> int:
        """Number of rows of a microbatch on one device."""
        return self.config.train.microbatch_size // self.placement.parts

    @property
    def batch_kind(self) -> type[Batch] | type[LabeledBatch]:
        """Type of the batches."""
        return LabeledBatch if isinstance(self.model, SequenceClassifier) else Batch

    @property
    def batch(self) -> AnyBatch:
        """Microbatches of a step, as shapes [microbatches, rows, tokens] with shardings."""
        train = self.config.train
        return abstract_batch(
            self.batch_kind,
            (train.gradient_accumulation, train.microbatch_size),
            train.max_length,
            self.placement.microbatches,
        )

    @property
    def init_batches(self) -> int:
        """Number of batches whose microbatches initialize an adapter from the gradient."""
        return -(-self.config.init_batches // self.config.train.gradient_accumulation)

    def init_microbatches(self, batches: Sequence[AnyBatch]) -> list[AnyBatch]:
        """Divides batches into the microbatches that initialize an adapter from the gradient.

        Args:
          batches: First `init_batches` batches of the stream, leaves [rows, ...].
        """
        size = self.config.train.microbatch_size
        return [
            jax.tree.map(lambda x, at=at: x[at : at + size], batch)
            for batch in batches
            for at in range(0, len(batch.tokens), size)
        ][: self.config.init_batches]

    def lasting(self, steps: int) -> "Blueprint":
        """Returns the same program with a schedule of `steps` steps.

        Raises:
          ValueError: The schedule does not fit in that many steps.
        """
        return dataclasses.replace(
            self,
            steps=steps,
            optimizer=optimizer_of(self.config, steps),
            learning_rate=learning_rate_schedule(self.config.optimizer, steps),
        )

    def trace_step(self) -> jax.stages.Traced:
        """Traces the step for the run's batches; lower and compile the result."""
        return self.trace(self.batch)


def draw_blueprint(
    config: RunConfig,
    model: Model,
    mesh: jax.sharding.Mesh,
    *,
    spec: AdapterSpec | None = None,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
) -> Blueprint:
    """Builds the program of a run on a mesh, whose devices need not be present.

    Args:
      config: Configuration of the run.
      model: Model to train.
      mesh: Mesh of devices.
      spec: Specification of the adapter. Default: that of the configuration.
      optimizer: Optimizer. Default: that of the configuration.

    Raises:
      ValueError: A module cannot be adapted, or the mesh does not divide the model or the batch.
        The message says what would work.
    """
    spec = config.spec if spec is None else spec
    platform = mesh.devices.flat[0].platform
    steps = config.train.steps or _STEPS_UNTIL_COUNTED
    optimizer = optimizer_of(config, steps) if optimizer is None else optimizer
    placement = place_rows(mesh)
    _check_rows(config, placement)
    layout = lay_out(
        model,
        spec,
        optimizer,
        mesh,
        params=model.abstract_params(config.model.dtype, config.model.quantization, platform),
        quantization=config.model.quantization,
        length=config.train.max_length,
    )
    return Blueprint(
        config=config,
        steps=steps,
        model=model,
        spec=spec,
        params=layout.params,
        constant=layout.constant,
        state=layout.state,
        optimizer=optimizer,
        learning_rate=learning_rate_schedule(config.optimizer, steps),
        clipping=config.applied_optimizer.clipping,
        mesh=mesh,
        placement=placement,
        chunk_size=config.train.loss_chunk,
        seed=config.seed,
        packed=config.data.packing,
        init_passes=config.init_passes,
    )


def optimizer_of(
    config: RunConfig, steps: int = _STEPS_UNTIL_COUNTED
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a configuration, including the hybrid's mixing.

    Args:
      config: Configuration of the run.
      steps: Number of steps that the schedule spans; the state's shapes do not depend on it.
    """
    mixing = config.mixing if config.spec.method.branches else None
    return make_optimizer(config.applied_optimizer, steps, mixing=mixing)


def _check_rows(config: RunConfig, placement: RowPlacement) -> None:
    """Rejects batches whose rows the devices cannot share equally."""
    train = config.train
    parts = placement.parts
    if train.microbatch_size % parts:
        raise ValueError(
            f"train.batch_size is {train.batch_size}, but must be a multiple of"
            f" {parts * train.gradient_accumulation}, so that {parts} devices share the rows of"
            f" {train.gradient_accumulation} microbatches equally"
        )
