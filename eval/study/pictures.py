"""The study's pictures."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.study.cell import Cell
from peft_jax.training.files import write_atomically
from peft_jax.training.plots import STYLE, smooth

_COLOURS = ("#d6604d", "#2166ac", "#1b7837", "#8c8c8c", "#e08214", "#762a83", "#35978f", "#bf812d")
_WINDOW = 9
_DPI = 90

Cells = Mapping[str, Mapping[str, Sequence[Cell]]]
"""The measured cells by task's and arm's title."""


def draw_losses(cells: Cells, path: Path, *, seconds: Mapping[str, Mapping[str, float]]) -> None:
    """The training loss of each method against steps, and against seconds; mean over seeds.

    Args:
      cells: the measured cells.
      path: of the picture.
      seconds: of a step, by task's and arm's title; a task that was not timed has none.
    """

    def draw() -> Figure:
        figure = Figure(figsize=(9.5, 2.7 * len(cells)), layout="constrained")
        grid = figure.subplots(len(cells), 2, squeeze=False)
        for (by_step, by_second), (task, arms) in zip(grid, cells.items(), strict=True):
            for colour, (arm, runs) in zip(_COLOURS, arms.items(), strict=False):
                curve = smooth(_mean(runs, "train_loss"), _WINDOW)
                steps = np.arange(1, len(curve) + 1)
                by_step.plot(steps, curve, color=colour, label=arm, linewidth=1.4)
                if seconds[task]:
                    by_second.plot(steps * seconds[task][arm], curve, color=colour, linewidth=1.4)
            by_step.set_title(task)
            by_step.set_ylabel("training loss")
            by_step.set_xlabel("step")
            if seconds[task]:
                by_second.set_xlabel("seconds of training")
            else:
                by_second.set_axis_off()
                by_second.text(0.5, 0.5, "not timed yet", ha="center", color="grey")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
        return figure

    _write(path, draw)


def draw_mixing(cells: Mapping[str, Sequence[Cell]], path: Path) -> None:
    """λ of each layer over the steps, one panel a task; mean over seeds."""

    def draw() -> Figure:
        figure = Figure(figsize=(3.2 * len(cells), 2.6), layout="constrained")
        panels = figure.subplots(1, len(cells), squeeze=False)[0]
        for panel, (task, runs) in zip(panels, cells.items(), strict=True):
            found = [np.asarray(run["steps"]["lambda"]["layers"], float) for run in runs]
            weights = np.mean(found, axis=0)
            for layer in range(weights.shape[1]):
                shade = mpl.colormaps["viridis"](layer / max(weights.shape[1] - 1, 1))
                panel.plot(
                    smooth(weights[:, layer], _WINDOW),
                    color=shade,
                    label=f"layer {layer}",
                    linewidth=1.3,
                )
            panel.set_ylim(0, 1)
            panel.set_title(task)
            panel.set_xlabel("step")
        panels[0].set_ylabel("λ, share of the low-rank branch")
        panels[-1].legend(fontsize=7)
        return figure

    _write(path, draw)


def draw_gradients(cells: Cells, path: Path) -> None:
    """The gradient's norm of each method over the steps, one panel a task; mean over seeds."""

    def draw() -> Figure:
        figure = Figure(figsize=(3.2 * len(cells), 2.9), layout="constrained")
        panels = figure.subplots(1, len(cells), squeeze=False)[0]
        for panel, (task, arms) in zip(panels, cells.items(), strict=True):
            for colour, (arm, runs) in zip(_COLOURS, arms.items(), strict=False):
                norms = [np.asarray(run["steps"]["grad_norm"], float) for run in runs]
                curve = smooth(np.mean(norms, axis=0), _WINDOW)
                panel.plot(curve, color=colour, label=arm, linewidth=1.3)
            panel.set_yscale("log")
            panel.set_title(task)
            panel.set_xlabel("step")
        panels[0].set_ylabel("norm of the gradient")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
        return figure

    _write(path, draw)


def _mean(runs: Sequence[Cell], name: str) -> np.ndarray:
    """The mean over runs, as long as the shortest."""
    shortest = min(len(run[name]) for run in runs)
    values = [[np.nan if x is None else x for x in run[name][:shortest]] for run in runs]
    return np.mean(np.asarray(values, float), axis=0)


def _write(path: Path, draw) -> None:
    with mpl.rc_context(STYLE):
        figure = draw()
        FigureCanvasAgg(figure)
        write_atomically(path, functools.partial(figure.savefig, dpi=_DPI))
