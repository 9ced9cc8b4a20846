"""Describes the results of a run for the terminal."""

from collections.abc import Iterator
from typing import Any

from peft_jax.training.config import RunConfig
from peft_jax.training.export import exported
from peft_jax.training.workdir import WorkDir


def describe_results(summary: dict[str, Any], config: RunConfig, folder: WorkDir) -> Iterator[str]:
    """Yields what a finished run prints: its measures, its speed and where its results are."""
    before, after = summary["before"], summary["after"]
    for name, value in after.items():
        if name != "targets":
            yield f"held-out {name}: {_measure(before.get(name))} -> {_measure(value)}"
    yield (
        f"{summary['steps']} steps, {summary['seconds_per_step']:.3g} s/step, "
        f"{summary['tokens_per_second']:.4g} tokens/s, {_speed(summary)}\n"
        f"{_list_results(config, folder)}\n"
        f"report:  {folder.report / 'README.md'}"
    )


def _list_results(config: RunConfig, folder: WorkDir) -> str:
    """Returns the exported folders as text, and which one to load."""
    names = exported(config)
    lines = [f"{name + ':':<8} {folder.path / name}" for name in names]
    if "model" in names:
        held, trained = config.model.dtype, config.spec.dtype
        rounded = f", trained in {trained}" if (held, trained) == ("bfloat16", "float32") else ""
        lines[0] += f" (full model in {held}{rounded}; load this)"
    return "\n".join(lines)


def _speed(summary: dict[str, Any]) -> str:
    """Returns the run's operations per second and utilization as text.

    Example:
      >>> _speed({"flops_per_second": 2.5e12, "utilization": 0.4})
      '2.5 TFLOP/s, 40% of the peak'
      >>> _speed({"flops_per_second": None, "utilization": None})
      'operations not counted'
    """
    rate, share = summary["flops_per_second"], summary["utilization"]
    if rate is None:
        return "operations not counted"
    return f"{rate / 1e12:.3g} TFLOP/s" + ("" if share is None else f", {share:.0%} of the peak")


def _measure(value: float | None) -> str:
    """Returns a metric with four decimals; None is missing or not finite.

    Example:
      >>> _measure(0.5), _measure(None)
      ('0.5000', 'not measured')
    """
    return "not measured" if value is None else f"{value:.4f}"
