"""Runs the missing cells of a study."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator

from peft_jax.runtime.compiled_programs import free_compiled_programs

from .adapter_sizes import check_budget
from .bench import Bench
from .cell import Cell, train_cell
from .facts import facts_digest, task_facts
from .settings import ArmSettings, StudySettings, TaskSettings
from .store import Store
from .timing import time_arms
from .trials import Choice, Search, Trial


def search(study: StudySettings, store: Store, task: TaskSettings, arm: ArmSettings) -> Search:
    """Returns the state of an arm's search for its best trial on a task."""

    def loss_of(trial: Trial) -> float | None:
        cell = store.read(task, arm, trial, seed=study.tune_seed, final=False)
        if cell is None:
            return None
        return math.inf if cell["loss"] is None else cell["loss"]

    return study.grid(task, arm).search(loss_of)


def tuned(
    study: StudySettings, store: Store, task: TaskSettings, arm: ArmSettings
) -> Choice | None:
    """Returns the choice of an arm on a task; None until its search is finished."""
    return search(study, store, task, arm).choice


def measured(
    study: StudySettings, store: Store, task: TaskSettings, arm: ArmSettings
) -> list[Cell]:
    """Returns the finished measured cells of an arm on a task, in the order of the seeds."""
    choice = tuned(study, store, task, arm)
    if choice is None:
        return []
    cells = [
        store.read(task, arm, choice.trial, seed=seed, final=True) for seed in study.seeds_of(task)
    ]
    return [cell for cell in cells if cell is not None]


def count_cells(study: StudySettings) -> int:
    """Counts the cells of a study, without extensions."""
    return sum(
        len(study.grid(task, arm).points()) + len(study.seeds_of(task))
        for task in study.tasks
        for arm in study.arms_of(task)
    )


def count_finished(study: StudySettings, store: Store) -> int:
    """Counts the finished cells, without extensions."""
    total = 0
    for task in study.tasks:
        for arm in study.arms_of(task):
            grid = study.grid(task, arm)
            total += len(measured(study, store, task, arm))
            total += sum(
                store.read(task, arm, grid.trial(point), seed=study.tune_seed, final=False)
                is not None
                for point in grid.points()
            )
    return total


def run_study(
    study: StudySettings,
    store: Store,
    *,
    only: str = "",
    until: float = math.inf,
    say: Callable[[str], None] = print,
) -> None:
    """Runs the missing cells of a study.

    Several processes may run at once; each takes cells that no other has claimed. Methods come
    before the hybrid's variants, an arm's trials before its measured cells, and timing last.

    Args:
      study: Settings of the study.
      store: Store of the cells.
      only: Regular expression; cells whose "task/arm" it does not match are skipped. The facts of a
        task have the name "task/facts", and its timing "task/timing".
      until: Time, as of `time.time`, after which no cell starts.
      say: Called with a message about each cell.

    Raises:
      ValueError: `only` is not a regular expression, or matches nothing; or the arms at the budget
        of a task that runs have different sizes.
    """
    names = _matching(study, only)
    for task in study.tasks:
        if any(name.startswith(f"{task.name}/") for name in names):
            check_budget(study, task)
    runner = _Runner(study=study, store=store, until=until, say=say)
    for task in study.tasks:
        if f"{task.name}/facts" in names:
            runner.note(task)
    # A pass may skip an arm of which another process has the last trial.
    while True:
        before = runner.done
        for task, arm in _pairs(study):
            if f"{task.name}/{arm.name}" in names:
                runner.run(task, arm)
                free_compiled_programs()
        if runner.done == before:
            break
    for task in study.tasks:
        if f"{task.name}/timing" in names:
            runner.time(task)


def _matching(study: StudySettings, only: str) -> set[str]:
    """Returns the names that a pattern matches: TASK/ARM, TASK/facts and TASK/timing."""
    names = [f"{task.name}/{arm.name}" for task, arm in _pairs(study)]
    names += [f"{task.name}/{what}" for task in study.tasks for what in ("facts", "timing")]
    try:
        matched = {name for name in names if re.search(only, name)}
    except re.error as error:
        raise ValueError(
            f"--only is {only!r}, which is not a regular expression: {error}"
        ) from error
    if not matched:
        raise ValueError(
            f"--only is {only!r}, which matches nothing; names are TASK/ARM, TASK/facts or"
            f" TASK/timing, with the tasks {', '.join(task.name for task in study.tasks)} and the"
            f" arms {', '.join(arm.name for arm in study.arms)}"
        )
    return matched


def _pairs(study: StudySettings) -> Iterator[tuple[TaskSettings, ArmSettings]]:
    for variant in (False, True):
        for task in study.tasks:
            for arm in study.arms_of(task):
                if arm.variant == variant:
                    yield task, arm


@dataclasses.dataclass
class _Runner:
    """Runs cells, and keeps what they share; see `run_study` for the attributes."""

    study: StudySettings
    store: Store
    until: float
    say: Callable[[str], None]
    done: int = 0
    _benches: dict[str, Bench] = dataclasses.field(default_factory=dict)

    def run(self, task: TaskSettings, arm: ArmSettings) -> None:
        """Runs the missing cells of an arm on a task."""
        tried: set[Trial] = set()
        while True:
            state = search(self.study, self.store, task, arm)
            missing = [trial for trial in state.missing if trial not in tried]
            if not missing:
                break
            for trial in missing:
                self._fill(task, arm, trial, seed=self.study.tune_seed, final=False)
            tried.update(missing)
        if state.choice is None:
            return
        for seed in self.study.seeds_of(task):
            self._fill(task, arm, state.choice.trial, seed=seed, final=True)

    def note(self, task: TaskSettings) -> None:
        """Measures the facts of a task, unless this is done."""
        wanted = facts_digest(self.study, task)
        if self.store.read_facts(task, wanted) is not None or time.time() > self.until:
            return
        with self.store.claim(self.store.facts_path(task)) as mine:
            if not mine:
                return
            facts = task_facts(self._bench(task), self.study.seeds_of(task)[0])
            self.store.write_facts(task, wanted, facts)
        self.say(f"{task.name}: counted the rows and measured the base model")

    def time(self, task: TaskSettings) -> None:
        """Times the steps of all arms on a task, unless this is done."""
        arms = self.study.timed_on(task)
        read = functools.partial(self.store.read_timing, task, arms)
        if read() is not None or time.time() > self.until:
            return
        with self.store.claim(self.store.timing_path(task)) as mine:
            if not mine or read() is not None:
                return
            timings = time_arms(self._bench(task), arms, seed=self.study.tune_seed)
            self.store.write_timing(task, arms, timings)
        self.say(f"{task.name}: timed the steps of {len(arms)} arms")

    def _bench(self, task: TaskSettings) -> Bench:
        if task.name not in self._benches:
            self._benches[task.name] = Bench(task, self.study.arms_of(task)[0])
        return self._benches[task.name]

    def _fill(
        self, task: TaskSettings, arm: ArmSettings, trial: Trial, *, seed: int, final: bool
    ) -> None:
        """Runs one cell, unless it is finished, another process has it, or the time is over."""
        read = functools.partial(self.store.read, task, arm, trial, seed=seed, final=final)
        if read() is not None or time.time() > self.until:
            return
        with self.store.claim(self.store.path(task, arm, trial, seed=seed, final=final)) as mine:
            if not mine or read() is not None:
                return
            cell = train_cell(self._bench(task), arm, trial, seed=seed, final=final)
            self.store.write(task, arm, cell, final=final)
        self.done += 1
        kind = f"seed {seed}" if final else "trial"
        loss = "diverged" if cell["loss"] is None else f"loss {cell['loss']:.4f}"
        self.say(
            f"{task.name}/{arm.name} {kind} rate {trial.rate:g} x{trial.scale:g}: {loss},"
            f" {cell['seconds']:.0f} s"
        )
