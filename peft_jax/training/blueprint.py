"""The program of a run, drawn from its configuration; no weights, no data."""

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
"""Length of the schedule while epochs have not been counted in steps; no shape depends on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blueprint(StepProgram):
    """What a run computes with; nothing in it is large.

    Attributes:
      config: The configuration.
      steps: Number of optimizer steps, which the schedule spans.
    """

    config: RunConfig
    steps: int

    @property
    def rows_on_a_device(self) -> int:
        """Rows of a microbatch that one device has a part of."""
        return self.config.train.microbatch_size // self.placement.parts

    @property
    def batch_kind(self) -> type[Batch] | type[LabeledBatch]:
        """What the batches are."""
        return LabeledBatch if isinstance(self.model, SequenceClassifier) else Batch

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

    @property
    def init_batches(self) -> int:
        """Number of batches that hold the microbatches a start along the gradient takes."""
        return -(-self.config.init_batches // self.config.train.gradient_accumulation)

    def init_microbatches(self, batches: Sequence[AnyBatch]) -> list[AnyBatch]:
        """Divides the first batches into the microbatches that such a start takes.

        Args:
          batches: The first `init_batches` of the stream, leaves [rows, ...].
        """
        size = self.config.train.microbatch_size
        return [
            jax.tree.map(lambda x, at=at: x[at : at + size], batch)
            for batch in batches
            for at in range(0, len(batch.tokens), size)
        ][: self.config.init_batches]

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

    def trace_step(self) -> jax.stages.Traced:
        """Traces the step of the run's batches; lower and compile it where it is to run."""
        return self.trace(self.batch)


def draw_blueprint(
    config: RunConfig,
    model: Model,
    mesh: jax.sharding.Mesh,
    *,
    spec: AdapterSpec | None = None,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
) -> Blueprint:
    """The program of a run of a model on a mesh, whose devices need not be there.

    Args:
      config: the configuration.
      model: the model.
      mesh: the devices.
      spec: what is adapted; by default as the configuration says.
      optimizer: Turns gradients into updates; by default as the configuration says.

    Raises:
      ValueError: what is to be adapted cannot be, or the mesh does not divide the model or the
        batch; the message says what would.
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
        mesh=mesh,
        placement=placement,
        chunk_size=config.train.loss_chunk,
        seed=config.seed,
        packed=config.data.packing,
    )


def optimizer_of(
    config: RunConfig, steps: int = _STEPS_UNTIL_COUNTED
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a configuration, the hybrid's mixing around it.

    Args:
      config: the configuration.
      steps: Number of steps that the schedule spans; the state's shapes do not depend on it.
    """
    mixing = config.mixing if config.spec.method.branches else None
    return make_optimizer(config.optimizer, steps, mixing=mixing)


def _check_rows(config: RunConfig, placement: RowPlacement) -> None:
    """Refuses batches that cannot be cut evenly."""
    train = config.train
    parts = placement.parts
    if train.microbatch_size % parts:
        raise ValueError(
            f"train.batch_size {train.batch_size} in {train.gradient_accumulation} microbatches "
            f"makes {train.microbatch_size} rows at a time, which {parts} devices cannot share "
            f"equally; the batch size must be a multiple of {parts * train.gradient_accumulation}"
        )
