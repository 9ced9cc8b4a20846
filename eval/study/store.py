"""Stores cells on disk, one JSON file each, so that a study can resume in any order."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.files import locked, write_text

from ..json_files import invalid_file, read_object
from .cell import Cell
from .settings import ArmSettings, TaskSettings, digest
from .source import agree, machine, source_of
from .timing import Timing
from .trials import Trial

_FIELDS = (
    *("learning_rate", "attention_scale", "seed", "diverged", "trainable_parameters"),
    *("step_bytes", "loss", "measures"),
)
_FINAL_FIELDS = ("row_losses", "row_targets", "calibration", "forgetting", "curve", "steps")
"""Fields of every cell, and further fields of a measured cell."""

_REMOVE = "Delete it and run the same command again, which runs this cell again"

SCRATCH = ".scratch"
"""Folder in the work directory for locks and compiled programs, which are not part of a study."""


class Store:
    """Cells of a study, in a work directory.

        cells/TASK/ARM/tune-RATE-xSCALE.json   tuning run
        cells/TASK/ARM/seed-N.json             measured cell, with the chosen trial
        cells/TASK/timing.json                 seconds per step of each arm
        cells/TASK/facts.json                  facts of the data and the base model

    Args:
      workdir: Folder that contains `cells/`.
    """

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self._folder = workdir / "cells"
        self._digests: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def path(
        self, task: TaskSettings, arm: ArmSettings, trial: Trial, *, seed: int, final: bool
    ) -> Path:
        """Returns the file of one cell."""
        name = f"seed-{seed}" if final else f"tune-{trial.name}"
        return self._folder / task.name / arm.name / f"{name}.json"

    def read(
        self, task: TaskSettings, arm: ArmSettings, trial: Trial, *, seed: int, final: bool
    ) -> Cell | None:
        """Reads a cell with exactly these settings; returns None if there is none.

        A cell with another model or data of the same name is not returned. A cell without
        fingerprints of them, because they came from the hub, is.
        """
        file = self.path(task, arm, trial, seed=seed, final=final)
        if not file.is_file():
            return None
        cell = read_object(file, "a cell of a study", _REMOVE)
        wanted = self._digest(task, arm, trial, seed=seed, final=final)
        if cell.get("digest") != wanted or not agree(cell.get("source", {}), source_of(task)):
            return None
        wanted_fields = {*_FIELDS, *(_FINAL_FIELDS if final else ())}
        if missing := sorted(wanted_fields - cell.keys()):
            error = ValueError(f"it lacks {', '.join(missing)}")
            raise invalid_file(file, "a cell of a study", error, _REMOVE)
        return cell

    def _digest(
        self, task: TaskSettings, arm: ArmSettings, trial: Trial, *, seed: int, final: bool
    ) -> str:
        """Returns the digest of a cell, which a page needs many times."""
        key = (id(task), id(arm), trial, seed, final)
        if key not in self._digests:
            wanted = digest(task.run_config(arm, trial, seed=seed, final=final), task, final=final)
            # Holding task and arm keeps their identities from being used again.
            self._digests[key] = (wanted, task, arm)
        return str(self._digests[key][0])

    def write(self, task: TaskSettings, arm: ArmSettings, cell: Cell, *, final: bool) -> None:
        """Writes a cell, atomically."""
        trial = Trial(cell["learning_rate"], cell["attention_scale"])
        _write(self.path(task, arm, trial, seed=cell["seed"], final=final), cell)

    def facts_path(self, task: TaskSettings) -> Path:
        """Returns the file of a task's facts."""
        return self._folder / task.name / "facts.json"

    def read_facts(self, task: TaskSettings, wanted: str) -> dict[str, Any] | None:
        """Returns a task's facts; None unless they have the digest `wanted`."""
        file = self.facts_path(task)
        if not file.is_file():
            return None
        found = read_object(file, "the facts of a study's task", _REMOVE)
        return found["facts"] if found.get("digest") == wanted else None

    def write_facts(self, task: TaskSettings, wanted: str, facts: dict[str, Any]) -> None:
        """Writes a task's facts, atomically."""
        _write(self.facts_path(task), {"digest": wanted, "facts": facts})

    def timing_path(self, task: TaskSettings) -> Path:
        """Returns the file of a task's timing."""
        return self._folder / task.name / "timing.json"

    def read_timing(
        self, task: TaskSettings, arms: Sequence[ArmSettings]
    ) -> dict[str, Timing] | None:
        """Returns each arm's cost of a step; None unless exactly these were timed."""
        file = self.timing_path(task)
        if not file.is_file():
            return None
        timing = read_object(file, "a study's timing", _REMOVE)
        if timing.get("digests") != _digests(task, arms):
            return None
        return {
            name: Timing(rounds=tuple(one["rounds"]), step_bytes=one["step_bytes"])
            for name, one in timing["arms"].items()
        }

    def write_timing(
        self, task: TaskSettings, arms: Sequence[ArmSettings], timings: Mapping[str, Timing]
    ) -> None:
        """Writes a task's timing, atomically."""
        found = {name: dataclasses.asdict(one) for name, one in timings.items()}
        timing = {"digests": _digests(task, arms), "machine": machine(), "arms": found}
        _write(self.timing_path(task), timing)

    @contextlib.contextmanager
    def claim(self, path: Path) -> Iterator[bool]:
        """Claims a cell; yields False if another process is working on it."""
        place = path.relative_to(self._folder).with_suffix(".lock")
        lock = self.workdir / SCRATCH / "locks" / place
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(lock))
            except RefusedError:
                yield False
            else:
                yield True
                lock.unlink(missing_ok=True)


def _digests(task: TaskSettings, arms: Sequence[ArmSettings]) -> dict[str, str]:
    """Returns digests of the settings that determine each arm's time per step."""
    return {
        arm.name: digest(task.run_config(arm, Trial(1.0), seed=0), task, final=False)
        for arm in arms
    }


def _write(file: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file, atomically and without spaces: cells are committed."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    write_text(file, text + "\n")
