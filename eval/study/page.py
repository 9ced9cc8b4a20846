"""Writes the page of a study, with tables and plots of the finished cells."""

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
from .statistics import MIN_P, Comparison, compare, holm, mean_and_deviation
from .store import Store

SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Results of an arm on a task, for all seeds.

    Attributes:
      arm: Settings of the arm.
      choice: Chosen learning rate.
      cells: Measured cells.
    """

    arm: ArmSettings
    choice: Choice
    cells: list[Cell]

    @property
    def loss(self) -> float:
        """Returns the mean test loss over seeds; infinite if one diverged."""
        losses = [math.inf if cell["loss"] is None else cell["loss"] for cell in self.cells]
        return statistics.fmean(losses)


Finished = dict[str, dict[str, Entry]]
"""Finished entries by names of task and arm."""


def collect(study: StudySettings, store: Store) -> Finished:
    """Returns the entries whose cells are all finished."""
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
    """Counts the finished cells."""
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
    """Writes `README.md` and its plots.

    Returns:
      The path of the page.

    Raises:
      ValueError: No cell is finished, and there is already a page.
    """
    page = folder / "README.md"
    if page.is_file() and not count_finished(study, store):
        raise ValueError(
            f"no cell of the study is finished here, so that {page} is not replaced; run the study"
            " first, or give another --page"
        )
    finished = collect(study, store)
    pictures = _draw(study, store, finished, folder)
    parts = _sections(study, store, finished, pictures)
    write_text(page, "\n\n".join(parts) + "\n")
    return page


def _draw(study: StudySettings, store: Store, finished: Finished, folder: Path) -> dict[str, str]:
    """Draws the plots that have data, and returns their file names."""
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
    """Returns whether a cell has a λ for each layer at every step."""
    return not cell["diverged"] and "layers" in cell["steps"]["lambda"]


def _seconds(study: StudySettings, store: Store, task: TaskSettings) -> dict[str, float]:
    """Returns each arm's median seconds per step; empty if the task is not timed."""
    timing = store.read_timing(task, study.arms_of(task)) or {}
    return {name: statistics.median(rounds) for name, rounds in timing.items()}


def _seconds_by_title(study: StudySettings, store: Store) -> dict[str, dict[str, float]]:
    """Returns the seconds per step by titles of task and arm."""
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
        yield "Training loss by step and by second, averaged over seeds and smoothed."
    if study.hybrid:
        yield "## Variants of the hybrid"
        yield _ablations(study, finished)
    if "lambda" in pictures:
        yield f"![λ by layer]({pictures['lambda']})"
        yield "λ of each layer by step, for the default hybrid."
    if "gradients" in pictures:
        yield f"![Gradient norms]({pictures['gradients']})"
    yield "## Protocol"
    yield _protocol(study)


def _missing(study: StudySettings, finished: Finished) -> str:
    names = [
        f"{task.name}: {', '.join(left)}"
        for task in study.tasks
        if (left := [a.name for a in study.arms_of(task) if a.name not in finished[task.name]])
    ]
    return f" Unfinished: {'; '.join(names)}." if names else ""


def comparisons(study: StudySettings, finished: Finished) -> dict[str, tuple[str, Comparison]]:
    """Compares the hybrid with its better branch, whose name comes first, on each task."""
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
        return "Not known yet: on no task are the hybrid and both of its branches finished."
    corrected = dict(zip(found, holm([c.p for _, c in found.values()]), strict=True))
    lines = [
        "| task | better branch | hybrid − branch, loss | p (Holm) | seeds won | |",
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
        f"The hybrid is significantly better on {wins} of {len(found)} tasks and significantly"
        f" worse on {losses}. Losses are on test rows. p is from a paired permutation test over"
        " rows, with each row's losses averaged over seeds. It is corrected for the number of tasks"
        " by Holm's method."
    )
    return "\n".join([head, "", *lines])


def _p(p: float, corrected: float) -> str:
    """Formats a corrected p-value, which is an upper bound at the test's minimum.

    Example:
      >>> _p(0.01, 0.03), _p(MIN_P, 5 * MIN_P)
      ('0.03', '≤ 0.00025')
    """
    bound = "≤ " if p <= MIN_P * (1 + 1e-9) else ""
    return f"{bound}{corrected:.2g}"


def _methods(task: TaskSettings, entries: Sequence[Entry], seconds: dict[str, float]) -> str:
    metric = task.metric.replace("_", " ")
    head = ["method", "test loss"]
    head += [metric] if metric else []
    head += ["rate", "trainable", "step, MiB", "s/step", "forgetting"]
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
    "Mean ± standard deviation over seeds; the lowest loss in bold. *rate*: learning rate chosen on"
    " the tuning rows; * marks the end of its grid. *trainable*: number of trainable parameters."
    " *step*: memory of the compiled step, as the compiler counts it. *s/step*: median over rounds"
    " in which all arms took turns. *forgetting*: for the language model, the increase of the loss"
    " on the base model's own text; for the encoder, 1 minus the cosine between a text's mean"
    " hidden states before and after training."
)


def _ablations(study: StudySettings, finished: Finished) -> str:
    """Formats each variant's loss minus the default hybrid's, by task."""
    tasks = [task for task in study.tasks if study.hybrid in finished[task.name]]
    if not tasks:
        return "Not known yet: the hybrid is not finished on any task."
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
        "Each variant's test loss minus the default hybrid's: above 0, the variant is worse. Bold:"
        " p < 0.05 in the same test, not corrected for the number of variants or tasks. The test is"
        f" over rows and does not cover the variation between the {len(study.seeds)} seeds, whose"
        " deviations are in the tables above. In parentheses: λ, averaged over layers, steps and"
        " seeds."
    )
    return "\n".join([head, "", *lines])


def _diverged(entry: Entry) -> bool:
    return any(cell["diverged"] for cell in entry.cells)


def _share(entry: Entry) -> str:
    """Formats the mean λ of a hybrid in parentheses; empty for other methods."""
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
                f" Parameters under `{component}` have the learning rate {rate:g} in all arms."
                for component, rate in task.config.optimizer.learning_rates.items()
            )
        )
    grid = len(study.tasks[0].rates(study.arms[0]))
    text = (
        f"Every arm has a grid of {grid} learning rates, which are tried with seed"
        f" {study.tune_seed}. The rate with the lowest loss on tuning rows, which are held out of"
        f" the training rows, is chosen. With it, {len(study.seeds)} other seeds are trained and"
        " measured on test rows, which no choice depends on. For one seed, all arms see the same"
        " batches in the same order and, on encoders, start from the same head. The optimizer is"
        " AdamW, with gradients clipped to norm 1."
    )
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    device = jax.devices()[0].device_kind
    return "\n".join([text, "", *rows, "", f"Written with {used}, on {device}."])


def _which_rows(task: TaskSettings, arm: ArmSettings) -> str:
    """Describes the training rows of a task's seeds, if it uses only some rows."""
    data = task.run_config(arm, learning_rate=1.0, seed=0).data
    if data.train_rows is None:
        return ""
    whose = "different for each seed" if data.train_rows_by_seed else "the same for all seeds"
    return f", from {data.train_rows:,} training rows, {whose}"


def _pm(cells: Sequence[Cell], values: Sequence[float | None], digits: int) -> str:
    """Formats mean ± deviation over cells, or why values are missing.

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
