"""Trains and measures one cell: an arm on a task, with a trial and a seed."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from peft_jax.adapters import AdapterState, count_parameters
from peft_jax.core import Tree
from peft_jax.training import RunConfig, TrainState

from .bench import Bench, Program
from .settings import ArmSettings, digest
from .source import machine, source_of
from .trial_optimizer import set_rates
from .trials import Trial

Cell = dict[str, Any]
"""JSON-serializable measurements of a cell."""

PARTS = 50
"""Largest number of values of a series by step; longer ones are averaged over equal parts."""

_DIGITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Arm before its first step.

    Attributes:
      config: Configuration of the run.
      steps: Number of steps of the run.
      program: Compiled training step.
      constant: Constant arrays of the adapter.
      frozen: Frozen parameters.
      state: Initial training state.
    """

    config: RunConfig
    steps: int
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


def make_start(
    bench: Bench, arm: ArmSettings, trial: Trial, *, seed: int, final: bool = True
) -> Start:
    """Prepares an arm for training with a trial and seed."""
    config = bench.task.run_config(arm, trial, seed=seed, final=final)
    steps = bench.steps(config)
    program = bench.program(arm, config)
    adapter = bench.initialize(arm, config)
    state = program.make_state(adapter.trainable)
    rates = set_rates(state.opt_state, config.applied_optimizer, steps)
    return Start(
        config=config,
        steps=steps,
        program=program,
        constant=adapter.constant,
        frozen=program.blueprint.spec.frozen(bench.params(seed)),
        state=TrainState(step=state.step, trainable=state.trainable, opt_state=rates),
    )


def train_cell(bench: Bench, arm: ArmSettings, trial: Trial, *, seed: int, final: bool) -> Cell:
    """Trains and measures one cell.

    Args:
      bench: Model, data and programs of the task.
      arm: Arm to train.
      trial: Learning rate and scale of the attention.
      seed: Seed of the data's order, of a new head, of the adapter and of its gradient's sketch.
      final: Whether to measure test rows, calibration, forgetting and a learning curve, and to
        record the steps; otherwise, measures only the rows that trials are chosen on.

    Returns:
      The measurements. "diverged" is true if the loss became infinite or NaN. Infinite losses are
      recorded as None.
    """
    began = time.perf_counter()
    start = make_start(bench, arm, trial, seed=seed, final=final)
    config, state = start.config, start.state
    blueprint = start.program.blueprint
    count = count_parameters(blueprint.spec, blueprint.params, blueprint.adapter)
    points = curve_steps(start.steps, bench.task.curve_points) if final else []
    records: list[dict[str, Any]] = []
    curve: list[float | None] = []
    for batch in bench.batches(seed)[: start.steps]:
        state, metrics = start.step(state, batch)
        records.append(jax.device_get(metrics))
        if not records[-1]["finite"]:
            break
        if len(records) in points:
            now = AdapterState(trainable=state.trainable, constant=start.constant)
            curve.append(rounded(bench.curve_loss(arm, config, now), 6))
    trained = AdapterState(trainable=state.trainable, constant=start.constant)
    cell: Cell = {
        "task": bench.task.name,
        "arm": arm.name,
        "digest": digest(config, bench.task, final=final),
        "source": source_of(bench.task),
        "machine": machine(),
        "learning_rate": trial.rate,
        "attention_scale": trial.scale,
        "seed": seed,
        "diverged": not all(bool(metrics["finite"]) for metrics in records),
        "trainable_parameters": count.trainable,
        "step_bytes": start.program.step_bytes,
    }
    measured = bench.measure(arm, config, trained, "test" if final else "tuning")
    cell["loss"] = rounded(measured.loss, 6)
    cell["measures"] = {name: rounded(value) for name, value in measured.measures.items()}
    cell["diverged"] |= cell["loss"] is None
    if final:
        cell["row_losses"] = [rounded(x, 5) for x in measured.losses]
        cell["row_targets"] = measured.targets.astype(int).tolist()
        cell["calibration"] = {name: rounded(x) for name, x in measured.calibration.items()}
        cell["forgetting"] = rounded(bench.forgetting(config, trained))
        cell["curve"] = {"steps": points[: len(curve)], "losses": curve}
        cell["steps"] = _by_step(records)
    cell["seconds"] = rounded(time.perf_counter() - began, 3)
    return cell


def curve_steps(steps: int, points: int) -> list[int]:
    """Returns the steps after which a curve is measured, evenly spaced to the last.

    Example:
      >>> curve_steps(100, 4), curve_steps(3, 10)
      ([25, 50, 75, 100], [1, 2, 3])
    """
    return sorted({round(steps * at / points) for at in range(1, points + 1)} - {0})


def averaged(values: Sequence[Any]) -> list[float | None]:
    """Returns the means of a series over at most `PARTS` equal parts of it.

    Example:
      >>> averaged([1.0, 3.0]), len(averaged(range(151)))
      ([1.0, 3.0], 50)
    """
    parts = np.array_split(np.asarray(values, np.float64), min(len(values), PARTS))
    return [rounded(part.mean()) for part in parts]


def rounded(value: Any, digits: int = _DIGITS) -> float | None:
    """Rounds a number to significant digits; returns None if it is not finite."""
    if value is None:
        return None
    value = float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _by_step(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns series by step, averaged over parts of the steps.

    "clipped" is the share of steps in which a group's gradient was clipped. "lambda" has the mean,
    minimum and maximum over layers by step, and the mean over steps by layer, for each group.
    """
    first = records[0]
    found: dict[str, Any] = {
        "taken": len(records),
        "train_loss": averaged([m["loss"] for m in records]),
        "grad_norm": averaged([m["grad_norm"] for m in records]),
        "branch_norm": {
            branch: averaged([np.linalg.norm(m["grad_norm_by_layer"][branch]) for m in records])
            for branch in first["grad_norm_by_layer"]
        },
        "clipped": {
            group: rounded(np.mean([m["clip_factor"][group] < 1.0 for m in records]))
            for group in first.get("clip_factor", {})
        },
    }
    mixing = {}
    for group in first["lambda"]:
        layers = np.asarray([np.ravel(m["lambda"][group]) for m in records], np.float64)
        mixing[group] = {
            "mean": averaged(layers.mean(axis=1)),
            "low": averaged(layers.min(axis=1)),
            "high": averaged(layers.max(axis=1)),
            "by_layer": [rounded(x) for x in layers.mean(axis=0)],
        }
    return {**found, "lambda": mixing}
