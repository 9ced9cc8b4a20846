"""Plots the metrics of a run."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray

from peft_jax.runtime.files import atomic_file
from peft_jax.training.report.metrics import HELD_OUT, TRAIN, Record

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_BLUE, _ORANGE, _GREY, _GREEN = "#2166ac", "#d6604d", "#8c8c8c", "#1b7837"
_BRANCHES = {
    "low_rank": ("low-rank branch", _ORANGE),
    "rotation": ("rotation branch", _BLUE),
    "adapter": ("adapter", _BLUE),
    "weights": ("fully trained weights", _GREEN),
}
_BRANCH_COLORS = "RdBu_r"
"""Color map of λ: red near 1 (low-rank branch) and blue near 0 (rotation), as in other plots."""


def draw_all(records: Sequence[Record], folder: Path) -> dict[str, Path]:
    """Draws every plot that the records have data for.

    Args:
      records: Records of a run, in the order of steps.
      folder: Folder of the PNG files.

    Returns:
      Files by plot: "loss", "learning_rate", "gradients", "clipping", "lambda".
    """
    train = [record for record in records if record["split"] == TRAIN]
    held_out = [record for record in records if record["split"] == HELD_OUT]
    pictures: dict[str, Callable[[], Figure]] = {}
    if train or held_out:
        pictures["loss"] = lambda: _draw_loss(train, held_out)
    if train:
        pictures["learning_rate"] = lambda: _draw_learning_rate(train)
        pictures["gradients"] = lambda: _draw_gradients(train)
    if any(any(record.get("clipped", {}).values()) for record in train):
        pictures["clipping"] = lambda: _draw_clipping(train)
    if any(record.get("lambda") for record in train):
        pictures["lambda"] = lambda: _draw_lambda(train)
    written = {}
    with mpl.rc_context(STYLE):
        for name, draw in pictures.items():
            written[name] = folder / f"{name}.png"
            with atomic_file(written[name]) as temporary:
                _save(draw(), temporary)
    return written


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _column(records: Sequence[Record], *names: str) -> NDArray[np.float64]:
    """Returns one number of each record, [records]; NaN if it is missing."""
    values = []
    for record in records:
        value: Any = record
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        values.append(np.nan if value is None else float(value))
    return np.asarray(values)


def _steps(records: Sequence[Record]) -> NDArray[np.float64]:
    return np.asarray([record["step"] for record in records], float)


def smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Returns a centered moving average, over fewer values near the ends.

    Example:
      >>> smooth(np.array([0.0, 3.0, 6.0, 9.0]), 3).tolist()
      [1.5, 3.0, 6.0, 7.5]
    """
    known = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    count = np.convolve(known.astype(float), kernel, "same")
    return total / np.maximum(count, 1.0)


def _new_figure(height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.add_subplot()


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _draw_loss(train: Sequence[Record], held_out: Sequence[Record]) -> Figure:
    figure, axes = _new_figure()
    steps, loss = _steps(train), _column(train, "loss")
    width = min(max(len(loss) // 20, 1), len(loss))
    if width > 2:
        axes.plot(steps, loss, color=_GREY, alpha=0.45, linewidth=0.8)
        axes.plot(steps, smooth(loss, width), color=_BLUE, linewidth=1.8, label="training")
    elif len(loss):
        axes.plot(steps, loss, color=_BLUE, linewidth=1.8, label="training")
    if held_out:
        steps, loss = _steps(held_out), _column(held_out, "loss")
        axes.plot(steps, loss, color=_ORANGE, marker="o", markersize=4, label="held out")
        for index in {0, len(loss) - 1}:
            if np.isfinite(loss[index]):
                axes.annotate(
                    f"{loss[index]:.3f}",
                    (steps[index], loss[index]),
                    textcoords="offset points",
                    xytext=(6, 6) if index == 0 else (-6, 8),
                    ha="left" if index == 0 else "right",
                    color=_ORANGE,
                )
    axes.margins(y=0.12)
    axes.set_title("Loss")
    axes.set_ylabel("cross-entropy, nats a token")
    _step_axis(axes)
    axes.legend()
    return figure


def _draw_learning_rate(train: Sequence[Record]) -> Figure:
    figure, axes = _new_figure(2.4)
    axes.plot(_steps(train), _column(train, "learning_rate"), color=_BLUE, linewidth=1.8)
    axes.set_title("Learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _step_axis(axes)
    return figure


def _draw_gradients(train: Sequence[Record]) -> Figure:
    """Draws the norm of the full gradient and of each branch, with its layers as a band."""
    figure, axes = _new_figure()
    steps = _steps(train)
    axes.plot(steps, _column(train, "grad_norm"), color="black", linewidth=1.2, label="all")
    for branch in train[0].get("grad_norm_by_layer", {}):
        label, color = _BRANCHES.get(branch, (branch, _GREEN))
        layers = _by_layer(train, "grad_norm_by_layer", branch)
        if layers is None:
            continue
        axes.plot(steps, np.nanmedian(layers, axis=1), color=color, label=f"{label}, median layer")
        axes.fill_between(
            steps,
            np.nanmin(layers, axis=1),
            np.nanmax(layers, axis=1),
            color=color,
            alpha=0.15,
            linewidth=0,
            label=f"{label}, all layers",
        )
    axes.set_yscale("log")
    # Labels ticks between the powers of ten too if the axis is short.
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    axes.set_title("Gradient norms")
    axes.set_ylabel("Frobenius norm, before clipping")
    _step_axis(axes)
    axes.legend(fontsize=8, ncols=2)
    return figure


def _draw_clipping(train: Sequence[Record]) -> Figure:
    """Draws the factor of clipping by group."""
    figure, axes = _new_figure(2.4)
    others = iter((_GREEN, _GREY))
    for group, share in train[-1]["clipped"].items():
        label, color = _BRANCHES.get(group) or (f"{group} gradients", next(others, "black"))
        factors = _column(train, "clip_factor", group)
        axes.plot(_steps(train), factors, color=color, label=f"{label} ({share:.0%})")
    axes.set_title("Clipping")
    axes.set_ylabel("factor")
    axes.set_ylim(0, 1.05)
    _step_axis(axes)
    axes.legend(fontsize=8)
    return figure


def _by_layer(records: Sequence[Record], *names: str) -> NDArray[np.float64] | None:
    """Returns a list by layer of each record, [records, layers]; None without such a list."""
    rows = []
    for record in records:
        value: Any = record
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, list) or not value:
            return None
        rows.append([np.nan if v is None else v for v in value])
    return np.asarray(rows, float)


def _lambda_rows(
    train: Sequence[Record],
) -> tuple[NDArray[np.float64], list[str], list[tuple[str, int]]]:
    """Returns λ [rows, steps], the labels of rows, and the groups with their numbers of rows."""
    rows, labels, groups = [], [], []
    for name, first in train[0]["lambda"].items():
        short = "" if name == "layers" else name.removeprefix("layers.").removesuffix(".kernel")
        if isinstance(first, list):
            layers = _by_layer(train, "lambda", name)
            if layers is None:
                continue
            rows += list(layers.T)
            labels += [str(index) for index in range(layers.shape[1])]
            groups.append((short, layers.shape[1]))
        else:
            rows.append(_column(train, "lambda", name))
            labels.append("")
            groups.append((short, 1))
    return np.asarray(rows), labels, groups


def _draw_lambda(train: Sequence[Record]) -> Figure:
    """Draws λ by layer and step, with its mean over layers above and over steps on the right."""
    train = [record for record in train if record.get("lambda")]
    rows, labels, groups = _lambda_rows(train)
    steps = _steps(train)
    height = float(np.clip(0.24 * len(rows) + 2.4, 3.6, 12.0))
    figure = Figure(figsize=(8.2, height), layout="constrained")
    grid = figure.add_gridspec(
        2, 3, width_ratios=(6.0, 1.2, 0.16), height_ratios=(1.0, max(height - 2.0, 1.8))
    )
    above, map_, beside = (figure.add_subplot(grid[at]) for at in ((0, 0), (1, 0), (1, 1)))

    # The scale is symmetric about ½, where both branches have the same weight.
    reach = float(np.clip(1.1 * np.nanmax(np.abs(rows - 0.5)), 0.05, 0.5))
    norm = TwoSlopeNorm(vcenter=0.5, vmin=0.5 - reach, vmax=0.5 + reach)
    edges = _edges(steps)
    image = map_.pcolormesh(
        edges,
        np.arange(len(rows) + 1) - 0.5,
        rows,
        cmap=_BRANCH_COLORS,
        norm=norm,
        rasterized=True,
    )
    map_.set_ylim(len(rows) - 0.5, -0.5)
    map_.set_xlim(edges[0], edges[-1])
    map_.grid(visible=False)
    _step_axis(map_)
    _label_rows(map_, labels, groups)

    mean = np.nanmean(rows, axis=0)
    above.fill_between(
        steps, np.nanmin(rows, axis=0), np.nanmax(rows, axis=0), color=_GREY, alpha=0.2, linewidth=0
    )
    above.plot(steps, mean, color="black", linewidth=1.4)
    above.axhline(0.5, color=_GREY, linewidth=0.8, linestyle=":")
    above.set_xlim(edges[0], edges[-1])
    above.tick_params(labelbottom=False)
    above.set_ylabel("mean λ\nand range", fontsize=8)
    above.set_title("λ, the low-rank branch's share of each layer's update")

    beside.axvline(0.5, color=_GREY, linewidth=0.8, linestyle=":")
    size = 3.5 if len(rows) <= 32 else 1.5
    start = 0
    for _, length in groups:
        part = slice(start, start + length)
        middle = np.arange(start, start + length)
        beside.plot(
            np.nanmean(rows[part], axis=1), middle, color="black", marker="o", markersize=size
        )
        start += length
    beside.set_ylim(map_.get_ylim())
    beside.set_yticks(map_.get_yticks())
    beside.tick_params(labelleft=False)
    beside.xaxis.set_major_locator(MaxNLocator(nbins=2))
    beside.set_title("mean over steps", fontsize=8, fontweight="normal", loc="center")
    beside.set_xlabel("λ", fontsize=8)

    bar = figure.colorbar(image, cax=figure.add_subplot(grid[1, 2]))
    bar.ax.set_title("low rank", fontsize=8, fontweight="normal", loc="left", color=_ORANGE)
    bar.ax.set_xlabel("rotation", fontsize=8, loc="left", color=_BLUE)
    bar.outline.set_visible(False)
    return figure


def _edges(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the borders of cells around the steps."""
    if len(steps) == 1:
        return np.asarray([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = steps[0] - (middles[0] - steps[0]), steps[-1] + (steps[-1] - middles[-1])
    return np.concatenate([[first], middles, [last]])


def _label_rows(axes: Axes, labels: list[str], groups: list[tuple[str, int]]) -> None:
    """Labels rows by layer number, or by kernel if several have a λ of their own."""
    if len(groups) == 1:
        every = max(len(labels) // 16, 1)
        axes.set_yticks(range(0, len(labels), every), labels[::every])
        axes.set_ylabel("layer")
        return
    starts = np.cumsum([0] + [size for _, size in groups])
    axes.set_yticks(
        [(a + b - 1) / 2 for a, b in itertools.pairwise(starts)],
        [name or "blocks" for name, _ in groups],
        fontsize=8,
    )
    for start in starts[1:-1]:
        axes.axhline(start - 0.5, color="white", linewidth=1.5)
    axes.set_ylabel("layers within each kernel, first at the top", fontsize=8)
