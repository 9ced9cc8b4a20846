"""Stores cells on disk, one JSON file each, so that a study can resume in any order."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.files import locked, write_text

from ..json_files import invalid_file, read_object
from .cell import Cell
from .settings import ArmSettings, TaskSettings, digest
from .source import agree, source_of

_FIELDS = (
    *("learning_rate", "seed", "diverged", "train_loss", "trainable_parameters", "step_bytes"),
    *("loss", "measures"),
)
_FINAL_FIELDS = ("row_losses", "row_targets", "forgetting", "steps")
"""Fields of every cell, and further fields of a measured cell."""

_REMOVE = "Delete it and run the same command again, which runs this cell again"


class Store:
    """Cells of a study, in a work directory.

        cells/TASK/ARM/tune-RATE.json   cell of a grid of learning rates
        cells/TASK/ARM/seed-N.json      measured cell, with the chosen learning rate
        cells/TASK/timing.json          seconds per step of each arm

    Args:
      workdir: Folder that contains `cells/`.
    """

    def __init__(self, workdir: Path):
        self._folder = workdir / "cells"

    def path(
        self, task: TaskSettings, arm: ArmSettings, *, learning_rate: float, seed: int, final: bool
    ) -> Path:
        """Returns the file of one cell."""
        name = f"seed-{seed}" if final else f"tune-{learning_rate:g}"
        return self._folder / task.name / arm.name / f"{name}.json"

    def read(
        self, task: TaskSettings, arm: ArmSettings, *, learning_rate: float, seed: int, final: bool
    ) -> Cell | None:
        """Reads a cell with exactly these settings; returns None if there is none.

        A cell with another model or data of the same name is not returned. A cell without
        fingerprints of them, from an older version, is.
        """
        place: dict[str, Any] = {"learning_rate": learning_rate, "seed": seed}
        file = self.path(task, arm, final=final, **place)
        if not file.is_file():
            return None
        cell = read_object(file, "a cell of a study", _REMOVE)
        wanted = digest(task.run_config(arm, **place), task)
        if cell.get("digest") != wanted or not agree(cell.get("source", {}), source_of(task)):
            return None
        wanted_fields = {*_FIELDS, *(_FINAL_FIELDS if final else ())}
        if missing := sorted(wanted_fields - cell.keys()):
            error = ValueError(f"it lacks {', '.join(missing)}")
            raise invalid_file(file, "a cell of a study", error, _REMOVE)
        return cell

    def write(self, task: TaskSettings, arm: ArmSettings, cell: Cell, *, final: bool) -> None:
        """Writes a cell, atomically."""
        file = self.path(
            task, arm, learning_rate=cell["learning_rate"], seed=cell["seed"], final=final
        )
        write_text(file, json.dumps(cell, allow_nan=False) + "\n")

    def timing_path(self, task: TaskSettings) -> Path:
        """Returns the file of a task's timing."""
        return self._folder / task.name / "timing.json"

    def read_timing(
        self, task: TaskSettings, arms: Sequence[ArmSettings]
    ) -> dict[str, list[float]] | None:
        """Returns each arm's seconds per step by round; None unless exactly these were timed."""
        file = self.timing_path(task)
        if not file.is_file():
            return None
        timing = read_object(file, "a study's timing", _REMOVE)
        return timing["seconds"] if timing.get("digests") == _digests(task, arms) else None

    def write_timing(
        self, task: TaskSettings, arms: Sequence[ArmSettings], seconds: dict[str, list[float]]
    ) -> None:
        """Writes a task's timing, atomically."""
        timing = {"digests": _digests(task, arms), "seconds": seconds}
        write_text(self.timing_path(task), json.dumps(timing, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def claim(self, path: Path) -> Iterator[bool]:
        """Claims a cell; yields False if another process is working on it."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path.with_suffix(".lock")))
            except RefusedError:
                yield False
            else:
                yield True
                path.with_suffix(".lock").unlink(missing_ok=True)


def _digests(task: TaskSettings, arms: Sequence[ArmSettings]) -> dict[str, str]:
    """Returns digests of the settings that determine each arm's time per step."""
    return {arm.name: digest(task.run_config(arm, learning_rate=1.0, seed=0), task) for arm in arms}
