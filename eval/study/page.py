"""Writes the page of a study, with tables and plots of the finished cells."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from peft_jax.runtime.files import write_text
from peft_jax.training.report.summary import versions

from .analysis import Analysis, Entry, analyze
from .cell import Cell
from .claims import write_claims
from .convergence import Reached, steps_to_match
from .pictures import draw_curves, draw_gradients, draw_mixing
from .run import count_cells, count_finished
from .settings import StudySettings, TaskSettings
from .statistics import Comparison
from .store import Store
from .tables import interval, p_value, plus_minus, share, table
from .trials import Trial

SIGNIFICANT = 0.05


def write_page(study: StudySettings, store: Store, folder: Path) -> Path:
    """Writes `README.md` and its plots, `claims.md`, and `statistics.json`.

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
    analysis = analyze(study, store)
    pictures = _draw(analysis, folder)
    parts = _sections(analysis, store, pictures)
    write_text(page, "\n\n".join(parts) + "\n")
    write_claims(analysis, folder / "claims.md")
    write_text(folder / "statistics.json", json.dumps(analysis.to_mapping(), indent=1) + "\n")
    return page


def _draw(analysis: Analysis, folder: Path) -> dict[str, str]:
    """Draws the plots that have data, and returns their file names."""
    study = analysis.study
    methods = {
        task.title: {
            entry.arm.title: entry
            for entry in analysis.entries[task.name].values()
            if not entry.arm.variant and not entry.diverged
        }
        for task in study.tasks
    }
    methods = {task: arms for task, arms in methods.items() if arms}
    hybrid = {
        task.title: entry.cells
        for task in study.tasks
        if (entry := analysis.entry(task, study.roles.hybrid)) is not None
        and not entry.diverged
        and all("layers" in cell["steps"]["lambda"] for cell in entry.cells)
    }
    pictures: dict[str, str] = {}
    if methods:
        draw_curves(methods, folder / "curves.png")
        draw_gradients(methods, folder / "gradients.png")
        pictures |= {"curves": "curves.png", "gradients": "gradients.png"}
    if hybrid:
        draw_mixing(hybrid, folder / "lambda.png")
        pictures["lambda"] = "lambda.png"
    return pictures


def _sections(analysis: Analysis, store: Store, pictures: dict[str, str]) -> Iterator[str]:
    study = analysis.study
    yield f"# {study.title}"
    yield from study.about
    done, total = count_finished(study, store), count_cells(study)
    state = "All" if done == total else f"**Not finished:** {done} of"
    yield f"{state} {total} cells are done." + _missing(analysis)
    if study.roles.hybrid:
        yield "## Is the hybrid better than its better branch?"
        yield _contrasts(analysis)
    yield "## The tasks"
    yield "\n".join(_task_facts(analysis, task) for task in study.tasks)
    yield "## The arms"
    for task in study.tasks:
        if entries := list(analysis.entries[task.name].values()):
            yield f"### {task.title}"
            yield _arms(task, entries)
    yield _LEGEND
    if "curves" in pictures:
        yield f"![Held-out loss]({pictures['curves']})"
        yield "Loss on held-out training rows by step and by second, averaged over seeds."
    yield from _time_sections(analysis)
    yield "## All differences"
    yield _EXPLORATORY
    for task in study.tasks:
        if len(analysis.entries[task.name]) > 1:
            yield f"### {task.title}: differences"
            yield _differences(analysis, task)
    if "lambda" in pictures:
        yield f"![λ]({pictures['lambda']})"
        yield "λ of the hybrid by step: the mean over layers and seeds, and the range over layers."
    if "gradients" in pictures:
        yield f"![Gradient norms]({pictures['gradients']})"
        yield "Norm of the gradient by step, averaged over seeds."
    yield "## Tuning"
    yield _tuning(analysis)
    yield "## Protocol"
    yield _protocol(analysis)


def _missing(analysis: Analysis) -> str:
    names = [
        f"{task.name}: {', '.join(left)}"
        for task in analysis.study.tasks
        if (
            left := [
                arm.name
                for arm in analysis.study.arms_of(task)
                if arm.name not in analysis.entries[task.name]
            ]
        )
    ]
    return f" Unfinished: {'; '.join(names)}." if names else ""


def verdict(comparison: Comparison, corrected_p: float) -> str:
    """Returns what a contrast shows, in words.

    A difference is shown if the corrected test over seeds is significant and the interval over
    seeds and rows is on one side of zero.
    """
    if corrected_p >= SIGNIFICANT or comparison.low <= 0.0 <= comparison.high:
        return "no difference shown"
    return "hybrid better" if comparison.difference < 0 else "hybrid worse"


def _contrasts(analysis: Analysis) -> str:
    study, found = analysis.study, analysis.contrasts
    if not found:
        return "Not known yet: on no task are the hybrid and all of its branches finished."
    rows = []
    verdicts = []
    for task in study.tasks:
        if task.name not in found:
            continue
        one = found[task.name]
        sizes = [analysis.entries[task.name][n].trainable for n in (study.roles.hybrid, one.branch)]
        result = one.comparison
        verdicts.append(verdict(result, one.corrected_p))
        rows.append(
            [
                task.title,
                study.arm(one.branch).title,
                f"{sizes[0]:,} and {sizes[1]:,}",
                f"{result.seeds}",
                f"{result.rows}",
                interval(result),
                f"{result.seeds_ahead}",
                p_value(result.p),
                p_value(one.corrected_p),
                verdicts[-1],
            ]
        )
    head = (
        f"Of {analysis.planned} planned contrasts {len(found)} are finished. The hybrid is better"
        f" on {verdicts.count('hybrid better')} of them, worse on"
        f" {verdicts.count('hybrid worse')}, and on {verdicts.count('no difference shown')} no"
        " difference is shown. The contrast was fixed before test rows were used: the hybrid with"
        " its default settings against the branch of its size with the lower loss on tuning rows."
        " Differences are of test losses, in nats per target; below 0 the hybrid is better. In"
        " brackets: the 95% interval of a bootstrap over seeds and rows. p is of a paired t-test"
        " over seeds, corrected for all planned contrasts by Holm's method."
    )
    columns = [
        *("task", "branch", "parameters, hybrid and branch", "seeds", "rows"),
        *("hybrid − branch", "seeds ahead", "p", "p (Holm)", ""),
    ]
    return f"{head}\n\n{table(columns, rows, left=(0, 1, 9))}"


def _task_facts(analysis: Analysis, task: TaskSettings) -> str:
    facts = analysis.facts[task.name]
    about = f" {task.about}" if task.about else ""
    if not facts:
        return f"- **{task.title}.**{about} Rows are not counted yet."
    rows = {
        which: f"{one['used']:,} of {one['checked']:,} {which} rows are used"
        + (f" ({_reasons(one['left_out'])})" if one["left_out"] else "")
        for which, one in facts["rows"].items()
    }
    text = facts["text"]
    if text["lost"]:
        symbols = " ".join(symbol for symbol in text["symbols"] if symbol != "`")
        lost = (
            f" The tokenizer drops or replaces {text['lost']:,} of {text['characters']:,}"
            f" characters of the test rows ({text['lost'] / text['characters']:.1%}), in"
            f" {text['rows_affected']:,} of {text['rows']:,} rows, mostly `{symbols}`: the model"
            " neither reads nor writes them."
        )
    else:
        lost = " The tokenizer loses no character of the test rows."
    base = f" The base has {facts['base_parameters']:,} parameters"
    if facts["four_bit"]:
        base += ", dequantized from four bits"
    if facts["base_loss"] is not None:
        base += f", and a loss of {facts['base_loss']:.4f} on the test rows"
    return f"- **{task.title}.**{about} {'; '.join(rows.values())}.{lost}{base}."


def _reasons(left_out: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())


def _arms(task: TaskSettings, entries: Sequence[Entry]) -> str:
    metric = task.metric.replace("_", " ")
    head = ["arm", "seeds", "test loss", *([metric] if metric else []), "ECE", "forgetting"]
    head += ["trainable", "step, MiB", "s/step", "clipped", "rate", "attention"]
    rows = []
    for entry in entries:
        cells = entry.cells
        row = [
            entry.arm.title,
            f"{len(cells)}",
            plus_minus(cells, [cell["loss"] for cell in cells], 4),
        ]
        if metric:
            row.append(plus_minus(cells, [cell["measures"].get(task.metric) for cell in cells], 3))
        row += [
            plus_minus(cells, [cell["calibration"].get("ece") for cell in cells], 3),
            plus_minus(cells, [cell["forgetting"] for cell in cells], 3),
            f"{entry.trainable:,}",
            f"{entry.step_bytes / 2**20:.0f}",
            "not timed" if entry.seconds is None else f"{entry.seconds:.3f}",
            _clipped(cells),
            f"{entry.choice.trial.rate:g}{'*' if entry.choice.edges else ''}",
            f"×{entry.choice.trial.scale:g}",
        ]
        rows.append(row)
    return table(head, rows)


_LEGEND = (
    "Mean ± standard deviation over seeds. *ECE*: expected calibration error in 15 bins, of the"
    " most likely token at each target or of the most likely label. *forgetting*: for a language"
    " model, the increase of the loss on the base model's own text; for an encoder, 1 minus the"
    " cosine between a text's mean hidden states before and after training. *trainable*: number of"
    " trainable parameters. *step*: memory of the compiled step, as the compiler counts it."
    " *s/step*: median over rounds in which all arms took turns. *clipped*: share of steps in which"
    " the gradient was clipped, by branch for a hybrid. *rate*, *attention*: chosen learning rate,"
    " and factor on it for the attention; * marks a choice at the edge of what was tried."
)


def _clipped(cells: Sequence[Cell]) -> str:
    """Formats the share of clipped steps of each group, averaged over seeds."""
    groups: dict[str, list[float]] = {}
    for cell in cells:
        for group, value in cell["steps"]["clipped"].items():
            groups.setdefault(group, []).append(value)
    shares = {name: sum(values) / len(values) for name, values in groups.items()}
    if len(shares) == 1:
        return share(next(iter(shares.values())))
    names = {"low_rank": "low rank"}
    return ", ".join(f"{names.get(name, name)} {share(value)}" for name, value in shares.items())


def _time_sections(analysis: Analysis) -> Iterator[str]:
    """Yields the section on the time to the same loss, for tasks with a reference."""
    study = analysis.study
    references = [name for name in (study.roles.full, study.roles.lora) if name]
    parts = []
    for task in study.tasks:
        here = [n for n in references if n in {arm.name for arm in study.arms_of(task)}]
        rows = _time_rows(analysis, task, here)
        if rows:
            head = ["arm"]
            for name in here:
                head += [f"to {study.arm(name).title}: steps", "seconds", "seeds"]
            parts += [f"### {task.title}: time", table(head, rows)]
    if parts:
        yield "## Time to the same loss"
        yield (
            "Steps and seconds after which the loss on held-out training rows is at most the last"
            " one of the reference's run with the same seed: the median over seeds, interpolated"
            " between measurements. *seeds*: in how many the arm gets there. Learning rates decay"
            " over the same number of steps in all runs. Seconds are steps times the timed seconds"
            " per step, without compilation and without the start along the gradient."
        )
        yield from parts


def _time_rows(analysis: Analysis, task: TaskSettings, references: list[str]) -> list[list[str]]:
    entries = [e for e in analysis.entries[task.name].values() if not e.diverged]
    rows = []
    for entry in entries:
        row = [entry.arm.title]
        for name in references:
            reference = analysis.entry(task, name)
            if reference is None or reference.diverged:
                row += ["not done", "", ""]
                continue
            found = steps_to_match(entry.cells, reference.cells)
            row += _reach(found, entry.seconds)
        rows.append(row)
    there = any(analysis.entry(task, name) for name in references)
    return rows if there and len(rows) > 1 else []


def _reach(found: Reached, seconds: float | None) -> list[str]:
    steps = "not reached" if found.steps is None else f"{found.steps:.0f}"
    spent = f"{found.steps * seconds:.1f}" if found.steps is not None and seconds else ""
    return [steps, spent, f"{found.reached} of {found.seeds}"]


_EXPLORATORY = (
    "Exploratory: these differences were not planned, and are not corrected for their number. Each"
    " is the arm's test loss minus the other's, with the 95% interval of the same bootstrap over"
    " seeds and rows; above 0 the arm is worse. λ is averaged over layers, steps and seeds."
)


def _differences(analysis: Analysis, task: TaskSettings) -> str:
    study = analysis.study
    others = [name for name in dict.fromkeys((study.roles.hybrid, study.roles.lora)) if name]
    head = ["arm", *(f"minus {study.arm(name).title}" for name in others), "λ"]
    rows = []
    for name, entry in analysis.entries[task.name].items():
        row = [entry.arm.title]
        for other in others:
            found = analysis.compare(task, name, other)
            if found is not None:
                row.append(interval(found))
            elif name == other:
                row.append("")
            else:
                row.append("diverged" if entry.diverged else "not done")
        rows.append([*row, _mean_lambda(entry)])
    return table(head, rows)


def _mean_lambda(entry: Entry) -> str:
    weights = [
        weight
        for cell in entry.cells
        for group in cell["steps"]["lambda"].values()
        for weight in group["by_layer"]
        if weight is not None
    ]
    return f"{sum(weights) / len(weights):.2f}" if weights else ""


def _tuning(analysis: Analysis) -> str:
    """Formats the search of every arm: where the best trial lies, and which edges remain."""
    study = analysis.study
    rows = []
    for task in study.tasks:
        for entry in analysis.entries[task.name].values():
            choice = entry.choice
            grid = study.grid(task, entry.arm)
            rows.append(
                [
                    task.title,
                    entry.arm.title,
                    ", ".join(f"{rate:g}" for rate in grid.rates),
                    f"{choice.trial.rate:g} ×{choice.trial.scale:g}",
                    f"{choice.loss:.4f}",
                    f"{choice.trials} ({choice.extensions} outside the grid)",
                    f"{choice.diverged}",
                    ", ".join(choice.edges) or "none",
                ]
            )
    if not rows:
        return "Not known yet."
    head = [
        *("task", "arm", "rates of the grid", "chosen", "tuning loss", "trials", "diverged"),
        "edges left",
    ]
    return (
        "*edges left*: directions in which the best trial has no neighbor, because the extensions"
        f" are used up.\n\n{table(head, rows, left=(0, 1, 7))}"
    )


def _protocol(analysis: Analysis) -> str:
    study = analysis.study
    lines = []
    for task in study.tasks:
        train = task.config.train
        length = f"{train.epochs:g} epochs" if train.steps is None else f"{train.steps} steps"
        tuning = "" if task.tune_steps is None else f" ({task.tune_steps} in tuning runs)"
        lines.append(
            f"- {task.title}: {length}{tuning} of {train.batch_size} rows of at most"
            f" {train.max_length} tokens{_which_rows(task, study)}, {len(study.seeds_of(task))}"
            f" seeds, scales {', '.join(f'{scale:g}' for scale in task.scales)} of the attention."
            + "".join(
                f" Parameters under `{component}` have the learning rate {rate:g} in all arms."
                for component, rate in task.config.optimizer.learning_rates.items()
            )
        )
    points = len(study.grid(study.tasks[0], study.arms_of(study.tasks[0])[0]).points())
    text = (
        f"Every arm has the same {points} trials on a task: learning rates times factors on the"
        f" learning rate of the attention, all with seed {study.tune_seed}. While the best one has"
        f" no neighbor along an axis, that neighbor is tried too, at most {study.extensions} times."
        " The trial with the lowest loss on tuning rows, which are held out of the training rows,"
        " is chosen. With it, other seeds are trained and measured on test rows, which no choice"
        " depends on. A seed draws the order of the rows, the adapter's start, the sketch of the"
        " gradient and, on encoders, the head. For one seed, all arms see the same batches in the"
        " same order. The optimizer is AdamW. Gradients are clipped to norm 1, each branch of a"
        " hybrid by its own norm."
    )
    machines = sorted(
        {
            cell["machine"]
            for entries in analysis.entries.values()
            for entry in entries.values()
            for cell in entry.cells
        }
    )
    made = f"Cells were made on: {'; '.join(machines)}. " if machines else ""
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    device = jax.devices()[0].device_kind
    return "\n".join([text, "", *lines, "", f"{made}Written with {used}, on {device}."])


def _which_rows(task: TaskSettings, study: StudySettings) -> str:
    """Describes the training rows of a task's seeds, if it uses only some rows."""
    data: Any = task.run_config(study.arms_of(task)[0], Trial(1.0), seed=0).data
    if data.train_rows is None:
        return ""
    whose = "different for each seed" if data.train_rows_by_seed else "the same for all seeds"
    return f", from {data.train_rows:,} training rows, {whose}"
