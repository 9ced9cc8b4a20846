"""Collects the finished cells of a study, and compares its arms."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from .cell import Cell
from .facts import facts_digest
from .run import measured, tuned
from .settings import ArmSettings, StudySettings, TaskSettings
from .statistics import Comparison, compare, holm
from .store import Store
from .timing import Timing
from .trials import Choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Results of an arm on a task, for all seeds.

    Attributes:
      arm: Settings of the arm.
      choice: Chosen trial.
      cells: Measured cells, in the order of the seeds.
      seconds: Median seconds per step; None if the task is not timed.
    """

    arm: ArmSettings
    choice: Choice
    cells: list[Cell]
    seconds: float | None

    @property
    def loss(self) -> float:
        """Returns the mean test loss over seeds; infinite if one diverged."""
        losses = [math.inf if cell["loss"] is None else cell["loss"] for cell in self.cells]
        return statistics.fmean(losses)

    @property
    def diverged(self) -> bool:
        """Returns whether a seed diverged."""
        return any(cell["diverged"] for cell in self.cells)

    @property
    def trainable(self) -> int:
        """Returns the number of trainable parameters."""
        return int(self.cells[0]["trainable_parameters"])

    @property
    def step_bytes(self) -> int:
        """Returns the memory of the compiled step in bytes."""
        return int(self.cells[0]["step_bytes"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """Planned comparison of a task: the hybrid against its better branch.

    Attributes:
      branch: Branch of the hybrid's size with the lower loss on tuning rows.
      comparison: The hybrid minus the branch.
      corrected_p: p-value corrected by Holm's method for the planned contrasts of the study. Those
        that are not finished count as p = 1.
    """

    branch: str
    comparison: Comparison
    corrected_p: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything that the pages show.

    Attributes:
      study: Settings of the study.
      entries: Finished entries by names of task and arm.
      facts: Facts by name of task.
      timings: Costs of a step by names of task and arm; empty for a task that is not timed.
      contrasts: Finished contrasts by name of task.
      planned: Number of planned contrasts.
    """

    study: StudySettings
    entries: Mapping[str, Mapping[str, Entry]]
    facts: Mapping[str, Mapping[str, Any]]
    timings: Mapping[str, Mapping[str, Timing]]
    contrasts: Mapping[str, Contrast]
    planned: int

    def entry(self, task: TaskSettings, name: str) -> Entry | None:
        """Returns the entry of an arm on a task; None if it is not finished, or `name` is empty."""
        return self.entries[task.name].get(name)

    def compare(self, task: TaskSettings, one: str, other: str) -> Comparison | None:
        """Compares two arms on a task; None unless both are finished and did not diverge."""
        entries = (self.entry(task, one), self.entry(task, other))
        if one == other or any(entry is None or entry.diverged for entry in entries):
            return None
        first, second = (entry.cells for entry in entries if entry is not None)
        return compare(first, second)

    def to_mapping(self) -> dict[str, Any]:
        """Returns the statistics of the pages, for `eval.study.recheck`."""
        hybrid, lora = self.study.roles.hybrid, self.study.roles.lora
        explored = []
        for task in self.study.tasks:
            for name in self.entries[task.name]:
                for other in dict.fromkeys((hybrid, lora)):
                    found = self.compare(task, name, other) if other else None
                    if found is not None:
                        explored.append(_record(task, name, other, found))
        tasks = {task.name: task for task in self.study.tasks}
        return {
            "planned_contrasts": self.planned,
            "branches": list(self.study.roles.branches),
            "contrasts": [
                {
                    **_record(tasks[name], hybrid, one.branch, one.comparison),
                    "corrected_p": one.corrected_p,
                }
                for name, one in self.contrasts.items()
            ],
            "exploratory": explored,
            "seeds": {task.name: list(self.study.seeds_of(task)) for task in self.study.tasks},
        }


def analyze(study: StudySettings, store: Store) -> Analysis:
    """Reads the cells of a study, and compares its arms."""
    timings = {
        task.name: store.read_timing(task, study.timed_on(task)) or {} for task in study.tasks
    }
    entries = {task.name: _entries(study, store, task, timings[task.name]) for task in study.tasks}
    facts = {
        task.name: store.read_facts(task, facts_digest(study, task)) or {} for task in study.tasks
    }
    names = (study.roles.hybrid, *study.roles.branches)
    planned = [
        task
        for task in study.tasks
        if study.roles.hybrid and {*names} <= {arm.name for arm in study.arms_of(task)}
    ]
    found: dict[str, tuple[str, Comparison]] = {}
    for task in planned:
        branch = better_branch(study, entries[task.name])
        both = [entries[task.name].get(name) for name in (study.roles.hybrid, branch or "")]
        if branch is None or any(entry is None or entry.diverged for entry in both):
            continue
        first, second = (entry.cells for entry in both if entry is not None)
        found[task.name] = (branch, compare(first, second))
    corrected = holm([found[t.name][1].p if t.name in found else 1.0 for t in planned])
    by_task = dict(zip([task.name for task in planned], corrected, strict=True))
    return Analysis(
        study=study,
        entries=entries,
        facts=facts,
        timings=timings,
        contrasts={
            name: Contrast(branch=branch, comparison=one, corrected_p=by_task[name])
            for name, (branch, one) in found.items()
        },
        planned=len(planned),
    )


def better_branch(study: StudySettings, entries: Mapping[str, Entry]) -> str | None:
    """Returns the branch with the lowest loss on tuning rows; None unless all are tuned."""
    if not all(name in entries for name in study.roles.branches):
        return None
    return min(study.roles.branches, key=lambda name: entries[name].choice.loss, default=None)


def _entries(
    study: StudySettings, store: Store, task: TaskSettings, timings: Mapping[str, Timing]
) -> dict[str, Entry]:
    """Returns the entries of a task whose cells are all finished."""
    found = {}
    for arm in study.arms_of(task):
        choice = tuned(study, store, task, arm)
        cells = measured(study, store, task, arm)
        if choice is not None and len(cells) == len(study.seeds_of(task)):
            timing = timings.get(arm.name)
            found[arm.name] = Entry(
                arm=arm,
                choice=choice,
                cells=cells,
                seconds=None if timing is None else timing.seconds,
            )
    return found


def _record(task: TaskSettings, one: str, other: str, found: Comparison) -> dict[str, Any]:
    return {"task": task.name, "one": one, "other": other, **dataclasses.asdict(found)}
