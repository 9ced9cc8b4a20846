"""Where a run starts: at its first step, or at a checkpoint of its own, and whether it may."""

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
    """Where a run starts.

    Attributes:
      step: Number of steps that have been taken.
      saved: What a checkpoint holds beside its arrays; None where there is no checkpoint.
      adapter: The adapter to start from where there is no checkpoint; None for a new one.
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
    """Finds where a run starts, and takes its data to that position.

    Args:
      job: What the run is made of.
      folder: Its work directory.
      checkpoints: The checkpoints there.
      inputs: The base and the data as they are now.
      finished: Whether the run in the work directory had come to its end.
      allowed: What may have changed, as in `check_unchanged`.
      warn: Told what is worth knowing.

    Raises:
      RefusedError: The checkpoint cannot be resumed from, or there is none where results are that a
        run from the first step would overwrite.
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
            f"{folder.path} holds a run that has taken {step} steps already, and this command asks"
            f" for {steps}; ask for at least {step}, or give a --workdir of its own"
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
    """Returns what the learning rate does in a run whose number of steps has changed.

    Args:
      optimizer: Its schedule.
      before: Number of steps the run was to take.
      steps: Number of steps it now takes.
      done: Number of steps it has taken.
    """
    name = optimizer.schedule.name
    was, now = learning_rate_schedule(optimizer, before), learning_rate_schedule(optimizer, steps)
    taken = jnp.arange(done)
    head = f"the run was to take {before} steps, and now takes {steps}"
    if np.array_equal(np.asarray(was(taken)), np.asarray(now(taken))):
        return (
            f"{head}: the {name} schedule gave the {done} steps that are done the same learning"
            f" rates, so the result will be that of an uninterrupted run of {steps} steps"
        )
    last, following = float(was(done - 1)), float(now(min(done, steps - 1)))
    return (
        f"{head}: the {name} schedule is drawn over {steps} steps anew, so the learning rate goes"
        f" from {last:.3g} in step {done} to {following:.3g} in the next, and an uninterrupted run"
        f" of {steps} steps would have had other rates before; with optimizer.schedule.name"
        " constant and no warmup_ratio both are the same"
    )


def _check_nothing_lost(folder: WorkDir, *, finished: bool, warn: Callable[[str], None]) -> None:
    """Rejects a run from the first step that would overwrite results."""
    if finished or folder.holds_adapter() or folder.holds_model():
        held = "an adapter" if folder.holds_adapter() else "a model"
        start = (
            f"--config.adapter.path={folder.adapter} starts from its adapter"
            if folder.holds_adapter()
            else f"--config.model.path={folder.model} starts from its model"
        )
        raise RefusedError(
            f"{folder.path} holds {'a finished run' if finished else held}, and no checkpoint that"
            " it could be resumed from; nothing is overwritten: give another --workdir, where"
            f" {start}"
        )
    if folder.metrics.is_file() and folder.metrics.stat().st_size:
        warn(
            f"{folder.path} holds no checkpoint that can be used: the run begins again at its"
            " first step"
        )


def _check_inputs(
    folder: WorkDir, saved: Mapping[str, Any], now: Inputs, *, allowed: Collection[str]
) -> list[str]:
    """Compares the base and the data with those that the run began with."""
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
            f"{folder.path} does not say with which base and data its run began, as version 0.1"
            " does not: whether they are the same is not known; from now on it does",
        ]
    return notes + check_unchanged(before, now, allowed=allowed, where=str(folder.path))


def _restore_position(
    job: Job, saved: Mapping[str, Any], *, other_rows: bool, warn: Callable[[str], None]
) -> None:
    """Takes the training stream to where the checkpoint was written.

    In other rows, which have been allowed, there may be no such position.
    """
    try:
        job.train.set_state(saved["data"])
    except ValueError as error:
        if not other_rows:
            raise RefusedError(str(error)) from error
        warn(f"{error}; the rows are read from their first on")
