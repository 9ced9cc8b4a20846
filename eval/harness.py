"""One task of lm-evaluation-harness, from requests to numbers with standard errors."""

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
"""Of the harness's own bootstrap, where a metric has no standard error in closed form."""


def evaluate_task(
    model: LM,
    task: Mapping[str, Any],
    *,
    limit: float | None = None,
    chat: bool = False,
    system: str = "",
    allow_unsafe: bool = False,
) -> dict[str, Any]:
    """The harness's results of a task or group that `build_task` made.

    Args:
      model: what answers.
      task: the task or group.
      limit: so many rows, or a share of them below 1; None: all.
      chat: put the model's chat template around prompts.
      system: what the system says first.
      allow_unsafe: whether tasks that run generated code in this process are run.

    Raises:
      ValueError: the task runs generated code, and that is not allowed.
    """
    # Its bootstrap forks, which a process with JAX in it must not.
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
    """The numbers of a task or group, from the harness's results.

    Args:
      name: of the task or group.
      task: as `build_task` made it.
      found: as `evaluate_task` gave it.
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
    """Writes each row's prompt, answers and scores, a line of JSON each."""
    lines = [json_line(sample, default=handle_non_serializable) for sample in samples]
    write_text(file, "".join(lines))


def _own_standard_error(
    name: str, task: Mapping[str, Any], found: Mapping[str, Any], metric: str, variant: str
) -> float | None:
    """The standard error of a measure of ours, which the harness knows none for."""
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
    """Keeps the harness's remarks on its own configurations off the terminal, errors aside."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
