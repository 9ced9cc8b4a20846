"""Runs the missing cells of a study."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence

from .bench import Bench
from .cell import Cell, train_cell
from .settings import ArmSettings, StudySettings, TaskSettings
from .store import Store
from .timing import time_arms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Chosen learning rate of an arm on a task.

    Attributes:
      rate: Learning rate with the lowest loss on the tuning rows.
      at_edge: Whether it is at an end of the grid, beyond which there may be a better one.
    """

    rate: float
    at_edge: bool


def choose_rate(rates: Sequence[float], cells: Sequence[Cell]) -> Choice | None:
    """Chooses the learning rate of a finished grid.

    Args:
      rates: Learning rates of the grid.
      cells: Cells of the grid, in the order of the rates.

    Returns:
      The choice; None if all cells diverged.
    """
    losses = [math.inf if cell["loss"] is None else cell["loss"] for cell in cells]
    best = min(range(len(losses)), key=losses.__getitem__)
    if math.isinf(losses[best]):
        return None
    edge = len(losses) > 1 and best in (0, len(losses) - 1)
    return Choice(rate=rates[best], at_edge=edge)


def tuned(
    study: StudySettings, store: Store, task: TaskSettings, arm: ArmSettings
) -> Choice | None:
    """Returns the `Choice` of an arm on a task, or None until its grid is finished."""
    rates = task.rates(arm)
    cells = [
        store.read(task, arm, learning_rate=rate, seed=study.tune_seed, final=False)
        for rate in rates
    ]
    found = [cell for cell in cells if cell is not None]
    return choose_rate(rates, found) if len(found) == len(cells) else None


def measured(
    study: StudySettings, store: Store, task: TaskSettings, arm: ArmSettings
) -> list[Cell]:
    """Returns the finished measured cells of an arm on a task, in the order of the seeds."""
    choice = tuned(study, store, task, arm)
    if choice is None:
        return []
    cells = [
        store.read(task, arm, learning_rate=choice.rate, seed=seed, final=True)
        for seed in study.seeds
    ]
    return [cell for cell in cells if cell is not None]


def count_cells(study: StudySettings) -> int:
    """Counts the cells of a study."""
    per_pair = len(study.tasks[0].rates(study.arms[0])) + len(study.seeds)
    return per_pair * sum(len(study.arms_of(task)) for task in study.tasks)


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
    before the hybrid's ablations, an arm's grid before its measured cells, and timing last.

    Args:
      study: Settings of the study.
      store: Store of the cells.
      only: Regular expression; cells whose "task/arm" it does not match are skipped. The timing of
        a task has the name "task/timing".
      until: Time, as of `time.time`, after which no cell starts.
      say: Called with a message about each cell.

    Raises:
      ValueError: `only` is not a regular expression, or matches nothing.
    """
    _check_only(study, only)
    runner = _Runner(study=study, store=store, until=until, say=say)
    for task, arm in _pairs(study):
        if re.search(only, f"{task.name}/{arm.name}"):
            runner.run(task, arm)
    for task in study.tasks:
        if re.search(only, f"{task.name}/timing"):
            runner.time(task)


def _check_only(study: StudySettings, only: str) -> None:
    names = [f"{task.name}/{arm.name}" for task, arm in _pairs(study)]
    names += [f"{task.name}/timing" for task in study.tasks]
    try:
        matched = [name for name in names if re.search(only, name)]
    except re.error as error:
        raise ValueError(
            f"--only is {only!r}, which is not a regular expression: {error}"
        ) from error
    if not matched:
        raise ValueError(
            f"--only is {only!r}, which matches nothing; names are TASK/ARM or TASK/timing, with"
            f" the tasks {', '.join(task.name for task in study.tasks)} and the arms"
            f" {', '.join(arm.name for arm in study.arms)}"
        )


def _pairs(study: StudySettings) -> Iterator[tuple[TaskSettings, ArmSettings]]:
    for ablation in (False, True):
        for task in study.tasks:
            for arm in study.arms_of(task):
                if arm.ablation == ablation:
                    yield task, arm


@dataclasses.dataclass
class _Runner:
    """Runs cells, and keeps what they share; see `run_study` for the attributes."""

    study: StudySettings
    store: Store
    until: float
    say: Callable[[str], None]
    _benches: dict[str, Bench] = dataclasses.field(default_factory=dict)

    def run(self, task: TaskSettings, arm: ArmSettings) -> None:
        """Runs the missing cells of an arm on a task."""
        for rate in task.rates(arm):
            self._fill(task, arm, learning_rate=rate, seed=self.study.tune_seed, final=False)
        choice = tuned(self.study, self.store, task, arm)
        if choice is None:
            return
        for seed in self.study.seeds:
            self._fill(task, arm, learning_rate=choice.rate, seed=seed, final=True)

    def time(self, task: TaskSettings) -> None:
        """Times the steps of all arms on a task, unless this is done."""
        arms = self.study.arms_of(task)
        read = functools.partial(self.store.read_timing, task, arms)
        if read() is not None or time.time() > self.until:
            return
        with self.store.claim(self.store.timing_path(task)) as mine:
            if not mine or read() is not None:
                return
            seconds = time_arms(self._bench(task), arms, seed=self.study.tune_seed)
            self.store.write_timing(task, arms, seconds)
        self.say(f"{task.name}: timed the steps of {len(arms)} arms")

    def _bench(self, task: TaskSettings) -> Bench:
        if task.name not in self._benches:
            self._benches[task.name] = Bench(task, self.study.arms[0])
        return self._benches[task.name]

    def _fill(
        self,
        task: TaskSettings,
        arm: ArmSettings,
        *,
        learning_rate: float,
        seed: int,
        final: bool,
    ) -> None:
        """Runs one cell, unless it is finished, another process has it, or the time is over."""
        read = functools.partial(
            self.store.read, task, arm, learning_rate=learning_rate, seed=seed, final=final
        )
        if read() is not None or time.time() > self.until:
            return
        path = self.store.path(task, arm, learning_rate=learning_rate, seed=seed, final=final)
        with self.store.claim(path) as mine:
            if not mine or read() is not None:
                return
            started = time.time()
            cell = train_cell(
                self._bench(task), arm, learning_rate=learning_rate, seed=seed, final=final
            )
            self.store.write(task, arm, cell, final=final)
        kind = f"seed {seed}" if final else "grid"
        loss = "diverged" if cell["loss"] is None else f"loss {cell['loss']:.4f}"
        self.say(
            f"{task.name}/{arm.name} {kind} rate {learning_rate:g}: {loss},"
            f" {time.time() - started:.0f} s"
        )
