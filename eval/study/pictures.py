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
from peft_jax.training.report.plots import STYLE, smooth

from .cell import Cell

_COLORS = ("#d6604d", "#2166ac", "#1b7837", "#8c8c8c", "#e08214", "#762a83", "#35978f", "#bf812d")
_SMOOTHED = 16
"""Inverse of the fraction of its steps that a curve is smoothed over: 9 steps of 150."""
_DPI = 90

Cells = Mapping[str, Mapping[str, Sequence[Cell]]]
"""Measured cells by titles of task and arm."""


def draw_losses(cells: Cells, path: Path, *, seconds: Mapping[str, Mapping[str, float]]) -> None:
    """Plots the training loss of each method by step and by second, averaged over seeds.

    Args:
      cells: Measured cells.
      path: File of the plot.
      seconds: Seconds per step by titles of task and arm; empty for a task that was not timed.
    """
    colors = _colors(cells)

    def draw() -> Figure:
        figure = Figure(figsize=(9.5, 2.7 * len(cells)), layout="constrained")
        grid = figure.subplots(len(cells), 2, squeeze=False)
        for (by_step, by_second), (task, arms) in zip(grid, cells.items(), strict=True):
            for arm, runs in arms.items():
                curve = _smoothed(_mean(runs, "train_loss"))
                steps = np.arange(1, len(curve) + 1)
                line = {"color": colors[arm], "label": arm, "linewidth": 1.4}
                by_step.plot(steps, curve, **line)
                if seconds[task]:
                    by_second.plot(steps * seconds[task][arm], curve, **line)
            by_step.set_title(task)
            by_step.set_ylabel("training loss")
            by_step.set_xlabel("step")
            if seconds[task]:
                by_second.set_xlabel("seconds of training")
            else:
                by_second.set_axis_off()
                by_second.text(0.5, 0.5, "not timed yet", ha="center", color="gray")
        _legend(figure)
        return figure

    _write(path, draw)


def draw_mixing(cells: Mapping[str, Sequence[Cell]], path: Path) -> None:
    """Plots λ of each layer by step, averaged over seeds, with one panel per task."""

    def draw() -> Figure:
        figure, panels = _panels(len(cells))
        for panel, (task, runs) in zip(panels, cells.items(), strict=True):
            found = [np.asarray(run["steps"]["lambda"]["layers"], float) for run in runs]
            weights = np.mean(found, axis=0)
            for layer in range(weights.shape[1]):
                shade = mpl.colormaps["viridis"](layer / max(weights.shape[1] - 1, 1))
                panel.plot(
                    _smoothed(weights[:, layer]),
                    color=shade,
                    label=f"layer {layer}",
                    linewidth=1.3,
                )
            panel.set_ylim(0, 1)
            panel.set_title(task, fontsize=9)
            panel.set_xlabel("step")
            panel.legend(fontsize=7, ncols=2, loc="lower left")
        figure.supylabel("λ, share of the low-rank branch", fontsize="medium")
        return figure

    _write(path, draw)


def draw_gradients(cells: Cells, path: Path) -> None:
    """Plots the gradient norm of each method by step, averaged over seeds, one panel per task."""
    colors = _colors(cells)

    def draw() -> Figure:
        figure, panels = _panels(len(cells))
        for panel, (task, arms) in zip(panels, cells.items(), strict=True):
            for arm, runs in arms.items():
                norms = [np.asarray(run["steps"]["grad_norm"], float) for run in runs]
                curve = _smoothed(np.mean(norms, axis=0))
                panel.plot(curve, color=colors[arm], label=arm, linewidth=1.3)
            panel.set_yscale("log")
            panel.set_title(task, fontsize=9)
            panel.set_xlabel("step")
        figure.supylabel("norm of the gradient", fontsize="medium")
        _legend(figure)
        return figure

    _write(path, draw)


def _smoothed(values: np.ndarray) -> np.ndarray:
    return smooth(values, max(len(values) // _SMOOTHED, 1))


def _colors(cells: Cells) -> dict[str, str]:
    """Returns the color of each arm's title, which is the same for all tasks."""
    arms = dict.fromkeys(arm for task in cells.values() for arm in task)
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


def _mean(runs: Sequence[Cell], name: str) -> np.ndarray:
    """Returns the mean over runs, up to the length of the shortest."""
    shortest = min(len(run[name]) for run in runs)
    values = [[np.nan if x is None else x for x in run[name][:shortest]] for run in runs]
    return np.mean(np.asarray(values, float), axis=0)


def _write(path: Path, draw) -> None:
    with mpl.rc_context(STYLE):
        figure = draw()
        FigureCanvasAgg(figure)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=_DPI)
