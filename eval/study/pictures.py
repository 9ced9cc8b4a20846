"""Draws the plots of a study."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peft_jax.runtime.files import atomic_file
from peft_jax.training.report.plots import STYLE

from .analysis import Entry
from .cell import Cell

_COLORS = ("#d6604d", "#2166ac", "#1b7837", "#8c8c8c", "#e08214", "#762a83", "#35978f", "#bf812d")
_DPI = 90

Entries = Mapping[str, Mapping[str, Entry]]
"""Finished entries by titles of task and arm."""


def draw_curves(entries: Entries, path: Path) -> None:
    """Plots the held-out loss of each arm by step and by second, averaged over seeds."""
    colors = _colors(entries)

    def draw() -> Figure:
        figure = Figure(figsize=(9.5, 2.7 * len(entries)), layout="constrained")
        grid = figure.subplots(len(entries), 2, squeeze=False)
        for (by_step, by_second), (task, arms) in zip(grid, entries.items(), strict=True):
            for title, entry in arms.items():
                steps = np.asarray(entry.cells[0]["curve"]["steps"], float)
                curve = np.mean([cell["curve"]["losses"] for cell in entry.cells], axis=0)
                line = {"color": colors[title], "label": title, "linewidth": 1.4}
                by_step.plot(steps, curve, **line)
                if entry.seconds:
                    by_second.plot(steps * entry.seconds, curve, **line)
            by_step.set_title(task)
            by_step.set_ylabel("held-out loss")
            by_step.set_xlabel("step")
            if by_second.lines:
                by_second.set_xlabel("seconds of training")
            else:
                by_second.set_axis_off()
                by_second.text(0.5, 0.5, "not timed yet", ha="center", color="gray")
        _legend(figure)
        return figure

    _write(path, draw)


def draw_mixing(cells: Mapping[str, Sequence[Cell]], path: Path) -> None:
    """Plots λ by step, averaged over seeds: the mean and the range over layers, a panel a task."""

    def draw() -> Figure:
        figure, panels = _panels(len(cells))
        for panel, (task, runs) in zip(panels, cells.items(), strict=True):
            found = {
                name: np.mean([run["steps"]["lambda"]["layers"][name] for run in runs], axis=0)
                for name in ("low", "mean", "high")
            }
            steps = _middles(runs[0], len(found["mean"]))
            panel.fill_between(steps, found["low"], found["high"], color=_COLORS[1], alpha=0.2)
            panel.plot(steps, found["mean"], color=_COLORS[1], linewidth=1.3)
            panel.set_ylim(0, 1)
            panel.set_title(task, fontsize=9)
            panel.set_xlabel("step")
        figure.supylabel("λ, share of the low-rank branch", fontsize="medium")
        return figure

    _write(path, draw)


def draw_gradients(entries: Entries, path: Path) -> None:
    """Plots the gradient norm of each arm by step, averaged over seeds, with a panel per task."""
    colors = _colors(entries)

    def draw() -> Figure:
        figure, panels = _panels(len(entries))
        for panel, (task, arms) in zip(panels, entries.items(), strict=True):
            for title, entry in arms.items():
                norms = np.mean([run["steps"]["grad_norm"] for run in entry.cells], axis=0)
                steps = _middles(entry.cells[0], len(norms))
                panel.plot(steps, norms, color=colors[title], label=title, linewidth=1.3)
            panel.set_yscale("log")
            panel.set_title(task, fontsize=9)
            panel.set_xlabel("step")
        figure.supylabel("norm of the gradient", fontsize="medium")
        _legend(figure)
        return figure

    _write(path, draw)


def _middles(cell: Cell, parts: int) -> np.ndarray:
    """Returns the middle step of each part that a cell's series are averaged over."""
    sizes = [len(part) for part in np.array_split(np.arange(cell["steps"]["taken"]), parts)]
    ends = np.cumsum(sizes)
    return ends - (np.asarray(sizes) - 1) / 2


def _colors(entries: Entries) -> dict[str, str]:
    """Returns the color of each arm's title, which is the same for all tasks."""
    arms = dict.fromkeys(arm for task in entries.values() for arm in task)
    return dict(zip(arms, itertools.cycle(_COLORS), strict=False))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Returns a figure with one panel per task, at most three in a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.3 * columns, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _legend(figure: Figure) -> None:
    """Adds one legend below all panels."""
    found: dict[str, Artist] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    columns = min(6, len(found))
    handles, labels = list(found.values()), list(found)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _write(path: Path, draw) -> None:
    with mpl.rc_context(STYLE):
        figure = draw()
        FigureCanvasAgg(figure)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=_DPI)
