"""Trains and measures one cell: an arm on a task, with a learning rate and a seed."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters import AdapterState, count_parameters
from peft_jax.core import Tree
from peft_jax.training import RunConfig, TrainState

from .bench import Bench, Program
from .settings import ArmSettings, digest
from .source import source_of

Cell = dict[str, Any]
"""JSON-serializable measurements of a cell."""

_DIGITS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Arm before its first step.

    Attributes:
      config: Configuration of the run.
      program: Compiled training step.
      constant: Constant arrays of the adapter.
      frozen: Frozen parameters.
      state: Initial training state.
    """

    config: RunConfig
    program: Program
    constant: Tree
    frozen: Tree
    state: TrainState

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Takes one training step on a batch [rows, ...], donating `state`."""
        blueprint = self.program.blueprint
        placed = blueprint.placement.put_microbatches(
            batch, blueprint.config.train.gradient_accumulation
        )
        return self.program.step(state, self.frozen, self.constant, placed)


def make_start(bench: Bench, arm: ArmSettings, *, learning_rate: float, seed: int) -> Start:
    """Prepares an arm for training with a learning rate and seed."""
    config = bench.task.run_config(arm, learning_rate=learning_rate, seed=seed)
    program = bench.program(arm, config)
    adapter = bench.initialize(arm, config)
    return Start(
        config=config,
        program=program,
        constant=adapter.constant,
        frozen=program.blueprint.spec.frozen(bench.params(seed)),
        state=_set_rate(program.make_state(adapter.trainable), learning_rate),
    )


def train_cell(
    bench: Bench, arm: ArmSettings, *, learning_rate: float, seed: int, final: bool
) -> Cell:
    """Trains and measures one cell.

    Args:
      bench: Model, data and programs of the task.
      arm: Arm to train.
      learning_rate: Peak of the schedule.
      seed: Seed of the data's order, of a new head and of the adapter.
      final: Whether to measure test rows and forgetting, and to record every step; otherwise,
        measures only the rows that learning rates are chosen on.

    Returns:
      The measurements. "diverged" is true if the loss became infinite or NaN. Infinite losses are
      recorded as None.
    """
    start = make_start(bench, arm, learning_rate=learning_rate, seed=seed)
    config, state = start.config, start.state
    blueprint = start.program.blueprint
    count = count_parameters(blueprint.spec, blueprint.params, blueprint.adapter)
    records = []
    for batch in bench.batches(seed):
        state, metrics = start.step(state, batch)
        records.append(jax.device_get(metrics))
        if not records[-1]["finite"]:
            break
    trained = AdapterState(trainable=state.trainable, constant=start.constant)
    cell: Cell = {
        "task": bench.task.name,
        "arm": arm.name,
        "digest": digest(config, bench.task),
        "source": source_of(bench.task),
        "learning_rate": learning_rate,
        "seed": seed,
        "diverged": not all(bool(metrics["finite"]) for metrics in records),
        "train_loss": [_rounded(metrics["loss"]) for metrics in records],
        "trainable_parameters": count.trainable,
        "step_bytes": start.program.step_bytes,
    }
    measured = bench.measure(arm, config, trained, "test" if final else "tuning")
    cell["loss"] = _rounded(measured.loss)
    cell["measures"] = {name: _rounded(value) for name, value in measured.measures.items()}
    cell["diverged"] |= cell["loss"] is None
    if final:
        cell["row_losses"] = [_rounded(x) for x in measured.losses]
        cell["row_targets"] = measured.targets.astype(int).tolist()
        cell["forgetting"] = _rounded(bench.forgetting(config, trained))
        cell["steps"] = _by_step(records)
    return cell


def _set_rate(state: TrainState, rate: float) -> TrainState:
    """Sets the learning rate of `with_rate` in a state."""
    opt_state = {**state.opt_state, "rate": jnp.asarray(rate, jnp.float32)}
    return TrainState(step=state.step, trainable=state.trainable, opt_state=opt_state)


def _by_step(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns, by step, factors of clipping, gradient norms by branch and layer, and λ by layer."""
    branches = records[0]["grad_norm_by_layer"]
    groups = records[0]["lambda"]
    return {
        "clip_factor": {
            group: [_rounded(m["clip_factor"][group]) for m in records]
            for group in records[0].get("clip_factor", {})
        },
        "grad_norm": [_rounded(metrics["grad_norm"]) for metrics in records],
        "grad_norm_by_layer": {
            branch: [
                [_rounded(x) for x in np.ravel(m["grad_norm_by_layer"][branch])] for m in records
            ]
            for branch in branches
        },
        "lambda": {
            group: [[_rounded(x) for x in np.ravel(m["lambda"][group])] for m in records]
            for group in groups
        },
    }


def _rounded(value: Any) -> float | None:
    """Rounds a number to five significant digits; returns None if it is not finite."""
    if value is None:
        return None
    value = float(value)
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
