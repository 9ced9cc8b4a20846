"""Decides whether a run starts at its first step or resumes from a checkpoint."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.adapters import AdapterState
from peft_jax.optim import OptimizerSettings, learning_rate_schedule
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.checkpoints import Checkpoints
from peft_jax.training.input_digests import Inputs, check_unchanged
from peft_jax.training.prepare import Job
from peft_jax.training.start_adapter import load_start
from peft_jax.training.workdir import WorkDir, compare_configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Start of a run.

    Attributes:
      step: Number of steps taken before.
      saved: JSON state of the checkpoint; None without one.
      adapter: Adapter to start from without a checkpoint; None for a new one.
    """

    step: int = 0
    saved: Mapping[str, Any] | None = None
    adapter: AdapterState | None = None


def find_start(
    job: Job,
    folder: WorkDir,
    checkpoints: Checkpoints,
    inputs: Inputs,
    *,
    finished: bool,
    allowed: Collection[str],
    warn: Callable[[str], None],
) -> Start:
    """Finds the start of a run, and moves its data stream to that position.

    Args:
      job: Job of the run.
      folder: Work directory.
      checkpoints: Checkpoints of the work directory.
      inputs: Base model and data now.
      finished: Whether the run in the work directory was finished.
      allowed: Inputs that may have changed, as in `check_unchanged`.
      warn: Prints warnings.

    Raises:
      RefusedError: The run cannot resume from the checkpoint, or there is no checkpoint and a new
        run would overwrite results.
    """
    step = checkpoints.newest(say=warn)
    if step is None:
        _check_nothing_lost(folder, finished=finished, warn=warn)
        return Start(adapter=load_start(job) if job.config.adapter.path else None)
    saved = checkpoints.read_run(step)
    where = str(checkpoints.path(step))
    compare_configs(saved["config"], job.config, where=where)
    steps = job.steps
    if step > steps:
        raise RefusedError(
            f"train.steps gives {steps} steps, but the run in {folder.path} has already taken"
            f" {step}; ask for at least {step}, or give a new run a --workdir of its own"
        )
    for note in _check_inputs(folder, saved, inputs, allowed=allowed):
        warn(note)
    other_rows = "data" in allowed or (
        "inputs" in saved and Inputs.from_mapping(saved["inputs"]).data != inputs.data
    )
    _restore_position(job, saved, other_rows=other_rows, warn=warn)
    before = saved.get("steps") or saved["config"]["train"]["steps"]
    if before != steps:
        warn(explain_schedule(job.config.optimizer, before=before, steps=steps, done=step))
    return Start(step=step, saved=saved)


def explain_schedule(optimizer: OptimizerSettings, *, before: int, steps: int, done: int) -> str:
    """Returns a message about the learning rate of a run whose number of steps has changed.

    Args:
      optimizer: Optimizer settings with the schedule.
      before: Number of steps that were configured before.
      steps: Number of steps that are configured now.
      done: Number of steps taken.
    """
    name = optimizer.schedule.name
    was, now = learning_rate_schedule(optimizer, before), learning_rate_schedule(optimizer, steps)
    taken = jnp.arange(done)
    head = f"the number of steps was {before} and is now {steps}"
    if np.array_equal(np.asarray(was(taken)), np.asarray(now(taken))):
        return (
            f"{head}: the {name} schedule has the same learning rates for the {done} steps taken,"
            f" so the result equals that of an uninterrupted run of {steps} steps"
        )
    last, following = float(was(done - 1)), float(now(min(done, steps - 1)))
    return (
        f"{head}: the {name} schedule now spans {steps} steps, so the learning rate jumps from"
        f" {last:.3g} in step {done} to {following:.3g} in the next. An uninterrupted run of"
        f" {steps} steps would have had other learning rates before; only with"
        " optimizer.schedule.name=constant and no warmup_ratio would both be equal"
    )


def _check_nothing_lost(folder: WorkDir, *, finished: bool, warn: Callable[[str], None]) -> None:
    """Rejects a run from the first step that would overwrite results."""
    if finished or folder.has_adapter() or folder.has_model():
        found = "an adapter" if folder.has_adapter() else "a model"
        start = (
            f"--config.adapter.path={folder.adapter} starts from its adapter"
            if folder.has_adapter()
            else f"--config.model.path={folder.model} starts from its model"
        )
        raise RefusedError(
            f"{folder.path} has {'a finished run' if finished else found}, but no checkpoint to"
            f" resume from, and nothing is overwritten: give another --workdir, where {start}"
        )
    if folder.metrics.is_file() and folder.metrics.stat().st_size:
        warn(f"{folder.path} has no usable checkpoint, so the run starts again at its first step")


def _check_inputs(
    folder: WorkDir, saved: Mapping[str, Any], now: Inputs, *, allowed: Collection[str]
) -> list[str]:
    """Compares the base model and the data with those that the run began with."""
    notes = []
    before = None
    try:
        before = Inputs.read(folder.inputs)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        notes.append(f"{folder.inputs} cannot be read ({error}); it is written again")
    if before is None and "inputs" in saved:
        before = Inputs.from_mapping(saved["inputs"])
    if before is None:
        return [
            *notes,
            f"{folder.path} has no record of the run's base model and data, as version 0.1 writes"
            " none; they are not compared, but recorded from now on",
        ]
    return notes + check_unchanged(before, now, allowed=allowed, where=str(folder.path))


def _restore_position(
    job: Job, saved: Mapping[str, Any], *, other_rows: bool, warn: Callable[[str], None]
) -> None:
    """Moves the training stream to the checkpoint's position.

    Other rows, which the user has allowed, may have no such position.
    """
    try:
        job.train.set_state(saved["data"])
    except ValueError as error:
        if not other_rows:
            raise RefusedError(str(error)) from error
        warn(f"{error}; rows are read from the first one")
