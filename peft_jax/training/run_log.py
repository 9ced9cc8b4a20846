"""Opens the log of a run's metrics, in a new file or after a checkpoint."""

from collections.abc import Callable, Sequence

import jax

from peft_jax.runtime.errors import RefusedError
from peft_jax.training.config import RunConfig
from peft_jax.training.placement import from_first
from peft_jax.training.report.metrics import MetricsLog, Sink, TensorBoard, WeightsAndBiases
from peft_jax.training.resume import Start
from peft_jax.training.workdir import WorkDir


def open_log(
    config: RunConfig,
    folder: WorkDir,
    start: Start,
    *,
    extra_sinks: Sequence[Sink] = (),
    warn: Callable[[str], None],
) -> MetricsLog:
    """Returns the log of a run, which only the first process writes.

    Args:
      config: Configuration of the run.
      folder: Its work directory.
      start: Where the run starts.
      extra_sinks: Destinations of records beside those of the configuration.
      warn: Is told which records are lost.

    Raises:
      RefusedError: The file holds a line that is no record.
    """
    if jax.process_index() != 0:
        # Received from the first process, so that all agree on the evaluations to make.
        present = [(int(step), str(split)) for step, split in from_first(None)]
        return MetricsLog(folder.metrics, writes=False, present=present)
    saved = start.saved
    step = None if saved is None else start.step
    sinks = (*_make_sinks(config, folder, step), *extra_sinks)
    try:
        log = MetricsLog(
            folder.metrics,
            from_step=step,
            sinks=sinks,
            held_out=() if saved is None else saved.get("held_out", ()),
        )
    except ValueError as error:
        raise RefusedError(
            f"{error}; remove the line, and the same command resumes the run"
        ) from error
    if saved is not None and (lost := saved.get("records", 1) - log.found) > 0:
        kept = "; held-out records are restored from the checkpoint"
        warn(
            f"{folder.metrics} has lost {lost if 'records' in saved else 'all'} of the"
            f" records up to step {step}, so the report's curves lack them"
            + (kept if "held_out" in saved else "")
        )
    from_first(log.present)
    return log


def _make_sinks(config: RunConfig, folder: WorkDir, step: int | None) -> list[Sink]:
    """Returns the destinations of records that the configuration asks for."""
    logging = config.logging
    sinks: list[Sink] = []
    if logging.tensorboard:
        sinks.append(TensorBoard(folder.tensorboard, from_step=step))
    if logging.wandb_project:
        sinks.append(
            WeightsAndBiases(
                project=logging.wandb_project,
                name=logging.wandb_name or folder.name,
                config=config.to_mapping(),
                folder=folder.path,
            )
        )
    return sinks
