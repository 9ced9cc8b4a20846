"""Evaluates one task of lm-evaluation-harness, with standard errors."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.utils import handle_non_serializable

from peft_jax.runtime.files import write_text

from .json_lines import json_line
from .results import Metric

_RESAMPLES = 1000
"""Resamples of the harness's bootstrap, for metrics without a closed-form standard error."""


def evaluate_task(
    model: LM,
    task: Mapping[str, Any],
    *,
    limit: float | None = None,
    chat: bool = False,
    system: str = "",
    allow_unsafe: bool = False,
) -> dict[str, Any]:
    """Evaluates a task or group from `build_task`, and returns the harness's results.

    Args:
      model: Model to evaluate.
      task: Task or group.
      limit: Number of rows, or a fraction of them below 1; None: all.
      chat: Whether to apply the model's chat template to prompts.
      system: System message of a chat.
      allow_unsafe: Whether to allow tasks that run generated code in this process.

    Raises:
      ValueError: The task runs generated code, and that is not allowed.
    """
    # The harness's bootstrap forks, which is unsafe in a process that runs JAX.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.redirect_stdout(io.StringIO()), quiet_harness():
        found = evaluate(
            model,
            dict(task),
            limit=limit,
            bootstrap_iters=_RESAMPLES,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=system or None,
            confirm_run_unsafe_code=allow_unsafe,
        )
    assert found is not None
    return dict(found)


def metrics_of(name: str, task: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Returns the metrics of a task or group.

    Args:
      name: Name of the task or group.
      task: Result of `build_task`.
      found: Result of `evaluate_task`.
    """
    metrics = []
    better = found["higher_is_better"].get(name, {})
    for key, value in found["results"][name].items():
        metric, comma, variant = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found["results"][name].get(f"{metric}_stderr,{variant}")
        if not isinstance(error, int | float):
            error = _own_standard_error(name, task, found, metric, variant)
        metrics.append(
            Metric(
                name=metric,
                variant="" if variant == "none" else variant,
                value=float(value),
                standard_error=None if error is None else float(error),
                higher_is_better=bool(better.get(metric, True)),
            )
        )
    return tuple(metrics)


def write_samples(file: Path, samples: list[Mapping[str, Any]]) -> None:
    """Writes the prompt, completions and scores of each row, one JSON line per row."""
    lines = [json_line(sample, default=handle_non_serializable) for sample in samples]
    write_text(file, "".join(lines))


def _own_standard_error(
    name: str, task: Mapping[str, Any], found: Mapping[str, Any], metric: str, variant: str
) -> float | None:
    """Returns the standard error of one of this project's metrics, unknown to the harness."""
    if name not in task["tasks"]:
        return None
    aggregation = task["tasks"][name].aggregation().get(metric)
    items = [
        sample[metric]
        for sample in found["samples"][name]
        if sample["filter"] == variant and metric in sample
    ]
    if not hasattr(aggregation, "standard_error") or len(items) < 2:
        return None
    return aggregation.standard_error(items)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silences the harness's warnings about its own configurations; errors are still shown."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
