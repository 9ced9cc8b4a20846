"""The page that a study leaves: tables and pictures of the cells that are finished."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from peft_jax.runtime.files import write_text
from peft_jax.training.report.summary import versions

from .cell import Cell
from .pictures import draw_gradients, draw_losses, draw_mixing
from .run import Choice, count_cells, measured, tuned
from .settings import ArmSettings, StudySettings, TaskSettings
from .statistics import LEAST_P, Comparison, compare, holm, mean_and_deviation
from .store import Store

SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One arm on one task, all of its seeds finished.

    Attributes:
      arm: the arm.
      choice: its learning rate.
      cells: its measured runs.
    """

    arm: ArmSettings
    choice: Choice
    cells: list[Cell]

    @property
    def loss(self) -> float:
        """The mean test loss over seeds; infinite where one diverged."""
        losses = [math.inf if cell["loss"] is None else cell["loss"] for cell in self.cells]
        return statistics.fmean(losses)


Finished = dict[str, dict[str, Entry]]
"""By task's and arm's name."""


def collect(study: StudySettings, store: Store) -> Finished:
    """What is finished."""
    found: Finished = {}
    for task in study.tasks:
        found[task.name] = {}
        for arm in study.arms_of(task):
            choice = tuned(study, store, task, arm)
            cells = measured(study, store, task, arm)
            if choice is not None and len(cells) == len(study.seeds):
                found[task.name][arm.name] = Entry(arm=arm, choice=choice, cells=cells)
    return found


def count_finished(study: StudySettings, store: Store) -> int:
    """How many cells are finished."""
    total = 0
    for task in study.tasks:
        for arm in study.arms_of(task):
            total += len(measured(study, store, task, arm))
            total += sum(
                store.read(task, arm, learning_rate=rate, seed=study.tune_seed, final=False)
                is not None
                for rate in task.rates(arm)
            )
    return total


def write_page(study: StudySettings, store: Store, folder: Path) -> Path:
    """Writes `README.md` and its pictures.

    Returns:
      The page.

    Raises:
      ValueError: no cell is finished, and there is a page already.
    """
    page = folder / "README.md"
    if page.is_file() and not count_finished(study, store):
        raise ValueError(f"no cell of the study is finished here, so {page} is left as it is")
    finished = collect(study, store)
    pictures = _draw(study, store, finished, folder)
    parts = _sections(study, store, finished, pictures)
    write_text(page, "\n\n".join(parts) + "\n")
    return page


def _draw(study: StudySettings, store: Store, finished: Finished, folder: Path) -> dict[str, str]:
    """The pictures there is something for; file names by picture."""
    methods = {
        task.title: {
            entry.arm.title: entry.cells
            for entry in finished[task.name].values()
            if not entry.arm.ablation and not any(cell["diverged"] for cell in entry.cells)
        }
        for task in study.tasks
    }
    methods = {task: arms for task, arms in methods.items() if arms}
    hybrid = {
        task.title: finished[task.name][study.hybrid].cells
        for task in study.tasks
        if study.hybrid in finished[task.name]
        and all(_has_layers(cell) for cell in finished[task.name][study.hybrid].cells)
    }
    pictures: dict[str, Any] = {}
    if methods:
        draw_losses(methods, folder / "losses.png", seconds=_seconds_by_title(study, store))
        draw_gradients(methods, folder / "gradients.png")
        pictures |= {"losses": "losses.png", "gradients": "gradients.png"}
    if hybrid:
        draw_mixing(hybrid, folder / "lambda.png")
        pictures["lambda"] = "lambda.png"
    return pictures


def _has_layers(cell: Cell) -> bool:
    """Whether a run has a λ for each layer at every step."""
    return not cell["diverged"] and "layers" in cell["steps"]["lambda"]


def _seconds(study: StudySettings, store: Store, task: TaskSettings) -> dict[str, float]:
    """The median over rounds of each arm's seconds a step; empty while the task is not timed."""
    timing = store.read_timing(task, study.arms_of(task)) or {}
    return {name: statistics.median(rounds) for name, rounds in timing.items()}


def _seconds_by_title(study: StudySettings, store: Store) -> dict[str, dict[str, float]]:
    """By task's and arm's title."""
    return {
        task.title: {
            study.arm(name).title: seconds for name, seconds in _seconds(study, store, task).items()
        }
        for task in study.tasks
    }


def _sections(
    study: StudySettings, store: Store, finished: Finished, pictures: dict[str, str]
) -> Iterator[str]:
    yield f"# {study.title}"
    yield from study.about
    done, total = count_finished(study, store), count_cells(study)
    state = "All" if done == total else f"**Not finished:** {done} of"
    yield f"{state} {total} cells are done." + _missing(study, finished)
    if study.hybrid:
        yield "## Does the hybrid beat its better branch?"
        yield _verdict(study, finished)
    yield "## Methods"
    for task in study.tasks:
        if rows := [e for e in finished[task.name].values() if not e.arm.ablation]:
            yield f"### {task.title}"
            yield _methods(task, rows, _seconds(study, store, task))
    yield _LEGEND
    if "losses" in pictures:
        yield f"![Training loss]({pictures['losses']})"
        yield "The training loss against steps and against seconds, mean over seeds, smoothed."
    if study.hybrid:
        yield "## The hybrid's parts"
        yield _ablations(study, finished)
    if "lambda" in pictures:
        yield f"![λ by layer]({pictures['lambda']})"
        yield "λ of each layer over the steps, for the hybrid as it is by default."
    if "gradients" in pictures:
        yield f"![Norms of gradients]({pictures['gradients']})"
    yield "## Protocol"
    yield _protocol(study)


def _missing(study: StudySettings, finished: Finished) -> str:
    names = [
        f"{task.name}: {', '.join(left)}"
        for task in study.tasks
        if (left := [a.name for a in study.arms_of(task) if a.name not in finished[task.name]])
    ]
    return f" Missing, in whole or in part: {'; '.join(names)}." if names else ""


def comparisons(study: StudySettings, finished: Finished) -> dict[str, tuple[str, Comparison]]:
    """By task's name the better branch's name, and the hybrid against it."""
    found = {}
    for task in study.tasks:
        entries = finished[task.name]
        if not all(name in entries for name in (study.hybrid, *study.branches)):
            continue
        best = min(study.branches, key=lambda name: entries[name].loss)
        if not any(c["diverged"] for n in (best, study.hybrid) for c in entries[n].cells):
            found[task.name] = (best, compare(entries[study.hybrid].cells, entries[best].cells))
    return found


def _verdict(study: StudySettings, finished: Finished) -> str:
    found = comparisons(study, finished)
    if not found:
        return "Not known yet: no task has the hybrid and both of its branches finished."
    corrected = dict(zip(found, holm([c.p for _, c in found.values()]), strict=True))
    lines = [
        "| task | better branch | hybrid's loss less its | p (Holm) | seeds ahead | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    wins = losses = 0
    for task in study.tasks:
        if task.name not in found:
            continue
        best, result = found[task.name]
        significant = corrected[task.name] < SIGNIFICANT
        wins += significant and result.difference < 0
        losses += significant and result.difference > 0
        verdict = "no difference shown"
        if significant:
            verdict = "**hybrid better**" if result.difference < 0 else "hybrid worse"
        lines.append(
            f"| {task.title} | {study.arm(best).title} | {result.difference:+.4f} |"
            f" {_p(result.p, corrected[task.name])} | {result.seeds_ahead} of {result.seeds} |"
            f" {verdict} |"
        )
    head = (
        f"Better with significance on {wins} of {len(found)} tasks, worse on {losses}. Losses are"
        " on test rows; p of a paired permutation test over rows, with the losses of a row averaged"
        " over seeds, corrected for the number of tasks by Holm's method."
    )
    return "\n".join([head, "", *lines])


def _p(p: float, corrected: float) -> str:
    """A corrected p-value; one at the test's floor is an upper bound.

    Example:
      >>> _p(0.01, 0.03), _p(LEAST_P, 5 * LEAST_P)
      ('0.03', '≤ 0.00025')
    """
    bound = "≤ " if p <= LEAST_P * (1 + 1e-9) else ""
    return f"{bound}{corrected:.2g}"


def _methods(task: TaskSettings, entries: Sequence[Entry], seconds: dict[str, float]) -> str:
    metric = task.metric.replace("_", " ")
    head = ["method", "test loss"]
    head += [metric] if metric else []
    head += ["rate", "trained", "step, MiB", "s a step", "forgetting"]
    lines = [f"| {' | '.join(head)} |", f"| --- {'| ---: ' * (len(head) - 1)}|"]
    best = min(entry.loss for entry in entries)
    for entry in entries:
        cells = entry.cells
        loss = _pm(cells, [cell["loss"] for cell in cells], 4)
        row = [entry.arm.title, f"**{loss}**" if entry.loss == best else loss]
        if metric:
            row.append(_pm(cells, [cell["measures"].get(task.metric) for cell in cells], 3))
        row += [
            f"{entry.choice.rate:g}{'*' if entry.choice.at_edge else ''}",
            f"{cells[0]['trainable_parameters']:,}",
            f"{cells[0]['step_bytes'] / 2**20:.0f}",
            f"{seconds[entry.arm.name]:.3f}" if seconds else "not timed",
            _pm(cells, [cell["forgetting"] for cell in cells], 3),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


_LEGEND = (
    "Mean ± standard deviation over seeds; the lowest loss in bold. *rate*: the learning rate that"
    " the tuning rows chose; * it is at the end of its grid. *step*: memory of the compiled step,"
    " as the compiler counts it. *s a step*: median of rounds in which all arms took turns."
    " *forgetting*: for the language model, how much the loss rose on text the base"
    " wrote itself; for the encoder, one less the cosine between a text's mean hidden states before"
    " and after."
)


def _ablations(study: StudySettings, finished: Finished) -> str:
    """Each variant's loss less the default hybrid's, by task."""
    tasks = [task for task in study.tasks if study.hybrid in finished[task.name]]
    if not tasks:
        return "Not known yet: the hybrid itself is not finished on any task."
    names = [arm.name for arm in study.arms if arm.ablation or arm.name in study.branches]
    without = {task.name for task in tasks if _diverged(finished[task.name][study.hybrid])}
    lines = [
        f"| variant | {' | '.join(task.title for task in tasks)} |",
        f"| --- {'| ---: ' * len(tasks)}|",
    ]
    hybrids = [finished[task.name][study.hybrid] for task in tasks]
    default = [
        "diverged" if _diverged(entry) else f"{entry.loss:.4f}{_share(entry)}" for entry in hybrids
    ]
    lines.append(f"| {study.arm(study.hybrid).title}: loss | {' | '.join(default)} |")
    for name in names:
        row = []
        for task in tasks:
            entries = finished[task.name]
            if name not in entries:
                in_it = study.arm(name) in study.arms_of(task)
                row.append("not done" if in_it else "")
            elif _diverged(entries[name]):
                row.append("diverged")
            elif task.name in without:
                row.append(f"{entries[name].loss:.4f}, alone")
            else:
                result = compare(entries[name].cells, entries[study.hybrid].cells)
                sign = "**" if result.p < SIGNIFICANT else ""
                row.append(f"{sign}{result.difference:+.4f}{sign}{_share(entries[name])}")
        lines.append(f"| {study.arm(name).title} | {' | '.join(row)} |")
    head = (
        "Each variant's test loss less the default hybrid's: above 0 the variant is worse. Bold: p"
        " < 0.05 of the same test, here not corrected for the number of variants or tasks; it is"
        f" over rows and says nothing about seeds, of which there are {len(study.seeds)}: beside"
        " the losses above stand their deviations. In brackets λ, the mean over layers, steps and"
        " seeds."
    )
    return "\n".join([head, "", *lines])


def _diverged(entry: Entry) -> bool:
    return any(cell["diverged"] for cell in entry.cells)


def _share(entry: Entry) -> str:
    """The mean λ of a hybrid, in brackets; nothing of another method."""
    weights = [
        weight
        for cell in entry.cells
        for steps in cell["steps"]["lambda"].values()
        for layers in steps
        for weight in layers
    ]
    return f" ({statistics.fmean(weights):.2f})" if weights else ""


def _protocol(study: StudySettings) -> str:
    rows = []
    for task in study.tasks:
        train = task.config.train
        length = f"{train.epochs:g} epochs" if train.steps is None else f"{train.steps} steps"
        rows.append(
            f"- {task.title}: {length} of {train.batch_size} rows of at most"
            f" {train.max_length} tokens{_which_rows(task, study.arms[0])}."
            + "".join(
                f" What is trained under `{component}` has the learning rate {rate:g} in all arms."
                for component, rate in task.config.optimizer.learning_rates.items()
            )
        )
    grid = len(study.tasks[0].rates(study.arms[0]))
    text = (
        f"Every arm has a grid of {grid} learning rates, tried with seed {study.tune_seed}; the"
        " lowest loss on rows held out of the training rows decides. With it,"
        f" {len(study.seeds)} further seeds are trained and measured on test rows that nothing was"
        " chosen by. For one seed all arms see the same batches in the same order and, on"
        " encoders, begin with the same head. AdamW, gradients clipped to norm 1."
    )
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    device = jax.devices()[0].device_kind
    return "\n".join([text, "", *rows, "", f"Drawn up with {used}, on {device}."])


def _which_rows(task: TaskSettings, arm: ArmSettings) -> str:
    """Says which training rows a task's seeds have, where it uses some of them."""
    data = task.run_config(arm, learning_rate=1.0, seed=0).data
    if data.train_rows is None:
        return ""
    whose = "others for each seed" if data.train_rows_by_seed else "the same for all seeds"
    return f", from {data.train_rows:,} training rows, {whose}"


def _pm(cells: Sequence[Cell], values: Sequence[float | None], digits: int) -> str:
    """Returns mean ± deviation over cells, or why values are not there.

    Example:
      >>> fine, gone = {"diverged": False}, {"diverged": True}
      >>> _pm([fine, fine], [1.0, 3.0], 1)
      '2.0 ± 1.4'
      >>> _pm([fine, gone], [1.0, None], 1), _pm([gone], [None], 1)
      ('1 diverged', 'diverged')
      >>> _pm([fine, fine], [None, None], 1), _pm([fine, fine], [1.0, None], 1)
      ('not measured', '1 not measured')
    """
    numbers = [value for value in values if value is not None]
    if len(numbers) == len(values):
        mean, deviation = mean_and_deviation(numbers)
        return f"{mean:.{digits}f} ± {deviation:.{digits}f}"
    counts = {"diverged": 0, "not measured": 0}
    for cell, value in zip(cells, values, strict=True):
        if value is None:
            counts["diverged" if cell["diverged"] else "not measured"] += 1
    return ", ".join(
        reason if count == len(values) else f"{count} {reason}"
        for reason, count in counts.items()
        if count
    )
