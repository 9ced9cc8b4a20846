"""Declares the sections of a run's settings, each validated by itself."""

import dataclasses
from typing import Any, Literal

from peft_jax.core.validation import check_choice, check_positive, check_positive_int
from peft_jax.models.architectures import ARCHITECTURES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The checkpoint to fine-tune.

    Attributes:
      path: Folder in Hugging Face's format (config.json, safetensors, a tokenizer), name on the
        Hugging Face hub, or location of a converted checkpoint ("gs://bucket/model"; see
        `peft_jax/convert.py`).
      revision: Branch, tag or commit on the hub; empty: the newest.
      dtype: Dtype of the base's parameters. Trainable arrays have that of `method.dtype`.
      architecture: Name of the architecture that the checkpoint must have, one of
        `peft_jax.models.architectures`. With it, a run can be planned without the checkpoint.
        Empty: any.
      quantization: Format of the frozen kernels of the transformer blocks, which are quantized
        while they are loaded: "int8", "nf4" (4 bits), "w8a8" (int8, with forward products of 8-bit
        integers), "w8a8g8" (as "w8a8", with backward products of 8-bit integers too), or "none" for
        `dtype`. Embeddings, head, norms and scales have `dtype`.
      weights: "checkpoint", or "random" for training the architecture of config.json from scratch,
        which needs no safetensors.
    """

    path: str
    revision: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    architecture: str = ""
    quantization: Literal["none", "int8", "nf4", "w8a8", "w8a8g8"] = "none"
    weights: Literal["checkpoint", "random"] = "checkpoint"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; give a folder with a Hugging Face checkpoint")
        if self.architecture:
            check_choice("architecture", self.architecture, ARCHITECTURES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartSettings:
    """The adapter to start from.

    Attributes:
      path: Folder of an adapter, ours or Hugging Face PEFT's, or its name on the hub; its method
        and modules have to be those of the section `method`. Empty: a new adapter.
      revision: Branch, tag or commit on the hub; empty: the newest.
    """

    path: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        if self.revision and not self.path:
            raise ValueError(
                f"adapter.revision is {self.revision!r}, and adapter.path is empty; give the"
                " adapter's name on the hub"
            )


MOST_STEPS = 2**31 - 1
"""Largest number of steps: the optimizer counts them in int32."""


def check_steps(steps: int, of: str = "train.steps") -> None:
    """Raises ValueError if a run has more steps than can be counted.

    Args:
      steps: Number of steps.
      of: Name of the setting, for the message.
    """
    if steps > MOST_STEPS:
        raise ValueError(f"{of} makes too many steps; a run has at most {MOST_STEPS:,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Length, learning rate and batch of a run.

    Exactly one of `steps` and `epochs` is given.

    Attributes:
      steps: Optimizer steps.
      epochs: Passes over the training rows, instead of `steps`; 0.5 is half a pass. All rows are
        encoded before the first step to find the number of steps.
      learning_rate: Peak of the schedule, which `optimizer.schedule` describes; by default the
        method's, and 1 for the optimizer prodigy, which estimates its own.
      batch_size: Number of rows in one optimizer step, over all devices and microbatches.
      gradient_accumulation: Number of microbatches that a step's rows are divided into. The result
        is the same up to rounding, in less memory.
      max_length: Number of tokens in a row.
      loss_chunk: Number of positions whose logits are held at once.
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float
    batch_size: int
    gradient_accumulation: int = 1
    max_length: int
    loss_chunk: int = 1024

    def __post_init__(self) -> None:
        self._check_length()
        check_positive("learning_rate", self.learning_rate)
        for name in ("batch_size", "gradient_accumulation", "loss_chunk"):
            check_positive_int(name, getattr(self, name))
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; a row needs at least 2 tokens")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size is {self.batch_size}, and gradient_accumulation ="
                f" {self.gradient_accumulation} does not divide it; choose a divisor of the batch"
                f" size: {_divisors(self.batch_size)}"
            )

    def _check_length(self) -> None:
        """Raises ValueError unless exactly one of `steps` and `epochs` is given."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs:g}; give one of the"
                " two, and set the other to None"
            )
        if self.steps is not None:
            check_positive_int("steps", self.steps)
            check_steps(self.steps)
        elif self.epochs is not None:
            check_positive("epochs", self.epochs)
            if self.epochs > MOST_STEPS:
                raise ValueError(f"epochs is {self.epochs:g}; it must be at most {MOST_STEPS:,}")
        else:
            raise ValueError("train.steps or train.epochs must be given; both are None")

    @property
    def microbatch_size(self) -> int:
        """Returns the number of rows in one microbatch, over all devices."""
        return self.batch_size // self.gradient_accumulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluation on held-out data, always before the first and after the last step.

    Attributes:
      every: Number of steps between evaluations; 0: only before and after.
    """

    every: int = 0

    def __post_init__(self) -> None:
        _check_not_negative(self, "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints to resume from, also before the first step and on a request to stop.

    Attributes:
      every: Number of steps between checkpoints; 0: only those.
      keep: Number of checkpoints to keep.
      asynchronous: Whether they are written while training continues.
    """

    every: int = 100
    keep: int = 3
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _check_not_negative(self, "every")
        if self.keep < 2:
            raise ValueError(
                f"keep is {self.keep}; at least 2, so that one is left if one is damaged"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Logging of metrics.

    Attributes:
      every: Number of steps between lines of metrics.jsonl; the first and the last step always have
        one.
      tensorboard: Whether to write TensorBoard events too, to the work directory's `tensorboard/`.
      wandb_project: Project on Weights & Biases to log to; empty: none.
      wandb_name: Name of the run there; empty: that of the work directory.
    """

    every: int = 1
    tensorboard: bool = True
    wandb_project: str = ""
    wandb_name: str = ""

    def __post_init__(self) -> None:
        check_positive_int("every", self.every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Format of the result.

    Attributes:
      merged: Whether to write the whole model to `model/`, in Hugging Face's format and in
        `model.dtype`, beside `adapter/`. None: for the method "full" only, whose result is the
        whole model and no adapter.
    """

    merged: bool | None = None


def _divisors(number: int) -> str:
    """Lists the first divisors of a number.

    Example:
      >>> _divisors(12)
      '1, 2, 3, 4, 6, 12'
    """
    few = [n for n in range(1, min(number, 4096) + 1) if number % n == 0]
    return ", ".join(map(str, few[:12])) + (", ..." if len(few) > 12 else "")


def _check_not_negative(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 0")
