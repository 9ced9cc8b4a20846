"""Holds results, with one record per metric, and formats them as JSON or a table."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .tasks.names import GLUE, SUITES, Wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """Value of one metric.

    Attributes:
      name: Name of the metric.
      variant: Extraction of the answer ("strict-match"), or the judge; "" for a single variant.
      value: Value.
      standard_error: Standard error of the value; None if unknown.
      higher_is_better: Whether higher values are better.
    """

    name: str
    value: float
    variant: str = ""
    standard_error: float | None = None
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Result of one task.

    Attributes:
      task: Name of the task.
      suite: Suite that included the task; "" if it was named itself.
      metrics: Metrics of the task.
      rows: Number of evaluated rows.
      rows_in_all: Number of rows of the task.
      seconds: Duration, without responses that were already stored.
      details: Further facts: shots, version, truncated prompts, signatures.
    """

    task: str
    metrics: tuple[Metric, ...]
    rows: int
    rows_in_all: int
    seconds: float
    suite: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Returns the result as a JSON-serializable mapping."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "TaskResult":
        """Reads a result of `to_mapping`.

        Raises:
          ValueError: A field is missing, unknown, or of the wrong type.
        """
        try:
            metrics = tuple(Metric(**metric) for metric in mapping["metrics"])
            found = cls(**{**mapping, "metrics": metrics})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        records: tuple[TaskResult | Metric, ...] = (found, *metrics)
        for record in records:
            for field in dataclasses.fields(record):
                value = getattr(record, field.name)
                if not _FORMS[field.name](value):
                    raise ValueError(f"{field.name} is {str(value)[:100]!r}, of the wrong type")
        return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_FORMS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("task", "suite", "name", "variant"), _is_text),
    **dict.fromkeys(("rows", "rows_in_all"), _is_count),
    **dict.fromkeys(("value", "seconds"), _is_number),
    "standard_error": lambda value: value is None or _is_number(value),
    "higher_is_better": lambda value: isinstance(value, bool),
    "metrics": lambda value: isinstance(value, tuple),
    "details": lambda value: isinstance(value, Mapping),
}
"""Checks of a value's type, by field."""


def averages(results: Sequence[TaskResult], wanted: Sequence[Wanted]) -> list[dict[str, Any]]:
    """Returns the averages of each suite, with the number of tasks behind them.

    GLUE averages each task's metrics and then the tasks, with MNLI's two sets as one task. XNLI
    averages accuracies. FLORES averages each score separately from English and into English.
    """
    found = []
    for suite in dict.fromkeys(item.suite for item in wanted if item.suite):
        members = {result.task: result for result in results if result.task in SUITES[suite]}
        for name, groups in _groups(suite, members).items():
            means = [_mean(group) for group in groups if group]
            if not means:
                continue
            value, error = _mean(means)
            found.append(
                {
                    "suite": suite,
                    "average": name,
                    "value": value,
                    "standard_error": error,
                    "tasks": len(members),
                    "tasks_in_all": len(SUITES[suite]),
                }
            )
    return found


_Number = tuple[float, float | None]


def _groups(suite: str, members: Mapping[str, TaskResult]) -> dict[str, list[list[_Number]]]:
    """Returns the values of each group of tasks, by name of the average."""
    if suite == "glue":
        groups = [("mnli", "mnli_mismatch") if task == "mnli" else (task,) for task in GLUE]
        groups = [group for group in groups if group != ("mnli_mismatch",)]
        scores = {task: _numbers(result, exclude=("answered",)) for task, result in members.items()}
        return {
            "score": [
                [number for task in group for number in scores.get(task, [])] for group in groups
            ]
        }
    if suite == "flores":
        return {
            f"{metric}, {where} English": [
                _numbers(result, only=metric)
                for task, result in members.items()
                if task.startswith("flores_eng_Latn-") == (where == "from")
            ]
            for metric in ("bleu", "chrf")
            for where in ("from", "to")
        }
    return {"accuracy": [_numbers(result, only="acc") for result in members.values()]}


def _numbers(result: TaskResult, *, only: str = "", exclude: Sequence[str] = ()) -> list[_Number]:
    return [
        (metric.value, metric.standard_error)
        for metric in result.metrics
        if metric.name not in exclude and only in ("", metric.name)
    ]


def _mean(numbers: Sequence[_Number]) -> _Number:
    """Returns the mean, and its standard error if all have one, assuming independence.

    Example:
      >>> _mean([(0.5, 0.03), (0.7, 0.04)])
      (0.6, 0.025)
    """
    errors = [error for _, error in numbers if error is not None]
    mean = sum(value for value, _ in numbers) / len(numbers)
    if len(errors) < len(numbers):
        return mean, None
    return mean, math.sqrt(sum(error**2 for error in errors)) / len(numbers)


def table(results: Sequence[TaskResult], means: Sequence[Mapping[str, Any]]) -> str:
    """Formats the results as an aligned Markdown table."""
    lines = [("task", "rows", "shots", "metric", "value", "±")]
    for result in results:
        rows = f"{result.rows:,}"
        if result.rows < result.rows_in_all:
            rows += f" of {result.rows_in_all:,}"
        for metric in result.metrics:
            name = metric.name + (f" ({metric.variant})" if metric.variant else "")
            name += "" if metric.higher_is_better else " (lower is better)"
            shots = str(result.details.get("num_fewshot", ""))
            lines.append(
                (result.task, rows, shots, name, *_shown(metric.value, metric.standard_error))
            )
    for mean in means:
        count = f"{mean['tasks']} of {mean['tasks_in_all']} tasks"
        shown = _shown(mean["value"], mean["standard_error"])
        lines.append((f"**{mean['suite']}**", count, "", f"mean {mean['average']}", *shown))
    return _markdown(lines)


def _shown(value: float, error: float | None) -> tuple[str, str]:
    digits = 2 if abs(value) >= 10 else 4
    return f"{value:.{digits}f}", "" if error is None else f"{error:.{digits}f}"


def _markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """Formats rows as a Markdown table with aligned columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = [name in ("value", "±", "shots") for name in lines[0]]

    def show(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rules = [
        "-" * (width - 1) + (":" if to_right else "-")
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join([show(lines[0]), show(rules), *map(show, lines[1:])]) + "\n"
