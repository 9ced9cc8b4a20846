"""Runs an evaluation: builds and checks the tasks, loads the model, and evaluates each task."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.files import locked, write_json, write_text
from peft_jax.runtime.progress import Reporter

from .harness import evaluate_task, metrics_of, quiet_harness, write_samples
from .json_files import invalid_file, read_object
from .loading import find_model, load
from .model import HarnessModel, check_room, longest_text, new_tokens_of
from .responses import ResponseStore
from .results import TaskResult, averages, table
from .settings import EvalSettings
from .tasks.build import build_task
from .tasks.local_data import MissingDataError
from .tasks.names import (
    HUMANEVAL,
    MT_BENCH,
    OURS,
    SUITES,
    Wanted,
    expand,
    is_flores,
    names_in,
    reads_local_data,
)
from .tasks.trained_prompts import has_trained_prompts

Evaluate = Callable[[HarnessModel], TaskResult]
"""Evaluates one task."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Task that was built and checked.

    Attributes:
      wanted: Name and suite of the task.
      asked: JSON-serializable settings that determine the result, besides the model.
      evaluate: Evaluates the task.
      needs_chat: Whether the task needs a chat template.
      new_tokens: Maximum new tokens of a completion; 0 if the task generates none.
    """

    wanted: Wanted
    asked: Mapping[str, Any]
    evaluate: Evaluate
    needs_chat: bool = False
    new_tokens: int = 0


Maker = Callable[[Wanted, Path], Job]
"""Builds a task that the harness does not have, given the folder of its output."""


_MOVE = "Move the folder away, or give another --output"
_REMOVE = (
    "Delete it and run the same command again, which rebuilds it from responses.jsonl, or give"
    " another --output"
)


class OutputFolder:
    """Output folder of an evaluation.

    identity.json     the model and its settings
    results.json      all metrics
    results.md        the metrics as a table
    responses.jsonl   the model's responses, from which an evaluation resumes
    samples/          the prompt, completions and scores of each row, by task

    Args:
      path: Path of the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Records the model that the results belong to.

        Raises:
          RefusedError: The folder holds results of another model.
        """
        file = self.path / "identity.json"
        if file.is_file():
            before = read_object(file, "an evaluation's record of its model", _MOVE)
            differing = [
                f"  {key}: {before.get(key)!r} before, {identity.get(key)!r} now"
                for key in sorted({*before, *identity})
                if before.get(key) != identity.get(key)
            ]
            if differing:
                raise RefusedError(
                    f"{self.path} holds results of another model, or of this one before it changed;"
                    " give another --output:\n" + "\n".join(differing)
                )
            return
        if self.path.is_dir() and any(self.path.glob("results.*")):
            raise RefusedError(
                f"{self.path} holds results that are not of this command; give another --output"
            )
        write_json(file, dict(identity))

    def read(self) -> dict[str, TaskResult]:
        """Reads the results so far, by task.

        Raises:
          RefusedError: The file is truncated, or not written by this command.
        """
        file = self.path / "results.json"
        if not file.is_file():
            return {}
        what = "an evaluation's results"
        content = read_object(file, what, _REMOVE)
        tasks = content.get("tasks")
        try:
            if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
                raise ValueError("it has no list of tasks")
            results = [TaskResult.from_mapping(task) for task in tasks]
        except ValueError as error:
            raise invalid_file(file, what, error, _REMOVE) from error
        return {result.task: result for result in results}

    def write(self, results: Sequence[TaskResult], means: Sequence[Mapping[str, Any]]) -> None:
        """Writes the results, atomically."""
        write_json(
            self.path / "results.json",
            {"tasks": [result.to_mapping() for result in results], "averages": list(means)},
        )
        write_text(self.path / "results.md", table(results, means))


def run(
    settings: EvalSettings,
    *,
    makers: Mapping[str, Maker] | None = None,
    reporter: Reporter | None = None,
    allow_unsafe: bool = False,
) -> str:
    """Evaluates a model, and writes the results.

    Args:
      settings: Settings of the evaluation.
      makers: Builders of HumanEval and MT-Bench, by name.
      reporter: Shows progress.
      allow_unsafe: Whether to allow tasks of the harness that run generated code in this process.

    Returns:
      The results as a table.

    Raises:
      RefusedError: The settings cannot be used; nothing was evaluated.
    """
    reporter = reporter or Reporter()
    folder = OutputFolder(settings.output_folder)
    with locked(folder.path / ".lock", "--output"):
        try:
            _ = settings.source  # Rejects an unfinished run before data are downloaded.
            jobs = _build(settings, makers or {}, folder, reporter, allow_unsafe)
            files = find_model(settings)
            if any(job.needs_chat for job in jobs) and not files.tokenizer.chat_template:
                raise ValueError(
                    f"{MT_BENCH} needs a chat template, but the tokenizer of {files.model} has"
                    " none; give a file with one as --chat_template"
                )
            _check_lengths(jobs, longest_text(files.context, settings.max_length))
            folder.claim({**files.identity(), **settings.identity()})
            results = folder.read()
        except (ValueError, OSError) as error:
            raise RefusedError(str(error)) from error
        waiting = [job for job in jobs if not _done(job, results, reporter)]
        if waiting:
            try:
                loaded, row_sharding = load(settings, files)
                model = HarnessModel(
                    loaded,
                    row_sharding=row_sharding,
                    batch_size=settings.batch_size,
                    max_length=settings.max_length,
                    seed=settings.seed,
                    split_special_tokens=files.split_special_tokens,
                    store=ResponseStore(folder.path / "responses.jsonl"),
                    reporter=reporter,
                )
            except ValueError as error:
                raise RefusedError(str(error)) from error
        wanted = [job.wanted for job in jobs]
        for number, job in enumerate(waiting):
            reporter.say(f"{job.wanted.name} ({number + 1} of {len(waiting)})")
            results[job.wanted.name] = _evaluate(job, model, reporter)
            folder.write(*_ordered(results, wanted))
        folder.write(*_ordered(results, wanted))
        return table(*_ordered({job.wanted.name: results[job.wanted.name] for job in jobs}, wanted))


def _build(
    settings: EvalSettings,
    makers: Mapping[str, Maker],
    folder: OutputFolder,
    reporter: Reporter,
    allow_unsafe: bool,
) -> list[Job]:
    """Builds every task with its data, and warns of a suite's tasks without local data."""
    manager = _manager(settings.tasks)
    jobs: list[Job] = []
    missing: dict[str, list[str]] = {}
    why: dict[str, MissingDataError] = {}
    for wanted in expand(settings.tasks, manager.all_tasks):
        if wanted.name in (HUMANEVAL, MT_BENCH):
            jobs.append(makers[wanted.name](wanted, folder.path))
            _warn_of_ignored(wanted.name, settings, None, reporter)
            continue
        try:
            jobs.append(_harness_job(wanted, settings, manager, folder, reporter, allow_unsafe))
        except MissingDataError as error:
            if not wanted.suite:
                raise
            missing.setdefault(wanted.suite, []).append(wanted.name)
            why.setdefault(wanted.suite, error)
    for suite, names in missing.items():
        if not any(job.wanted.suite == suite for job in jobs):
            raise ValueError(f"{settings.data} has no data for {suite}: {why[suite]}")
        reporter.warn(
            f"{settings.data} has no data for some tasks of {suite}, which are skipped:"
            f" {', '.join(names)}"
        )
    return jobs


def _manager(names: Sequence[str]) -> TaskManager:
    """Returns the harness's tasks, or only this project's if no others are named.

    Names are checked first, because the harness takes many seconds to read its thousands of
    configurations.

    Raises:
      ValueError: A name is unknown.
    """
    tasks = Path(lm_eval.tasks.__file__).parent
    if all(name in OURS or is_flores(name) or name in SUITES for name in names):
        folders: list[str | Path] = [tasks / name for name in ("glue", "gsm8k", "xnli")]
        return TaskManager(include_defaults=False, include_path=folders)
    expand(names, names_in(tasks))
    return TaskManager()


def _harness_job(
    wanted: Wanted,
    settings: EvalSettings,
    manager: TaskManager,
    folder: OutputFolder,
    reporter: Reporter,
    allow_unsafe: bool,
) -> Job:
    with quiet_harness():
        task = build_task(wanted.name, settings.task_settings, manager)
    unsafe = [name for name, one in task["tasks"].items() if getattr(one, "UNSAFE_CODE", False)]
    if unsafe and not allow_unsafe:
        raise ValueError(
            f"{', '.join(unsafe)} runs generated code in this process, without a sandbox; use"
            " this project's humaneval, which has one, or give --allow_unisolated_code"
        )

    shots = {one.get_config("num_fewshot") for one in task["tasks"].values()}
    _warn_of_ignored(wanted.name, settings, shots, reporter)

    def evaluate(model: HarnessModel) -> TaskResult:
        started = time.monotonic()
        model.truncated = 0
        found = evaluate_task(
            model,
            task,
            limit=settings.limit,
            chat=settings.chat,
            system=settings.system,
            allow_unsafe=allow_unsafe,
        )
        for name, samples in found["samples"].items():
            write_samples(folder.path / "samples" / f"{name}.jsonl", samples)
        counts = [found["n-samples"][name] for name in task["tasks"]]
        details: dict[str, Any] = {
            "num_fewshot": next(iter(shots)) if len(shots) == 1 else "various",
            "version": found["versions"].get(wanted.name),
            "truncated": model.truncated,
        }
        if wanted.name in task["tasks"]:
            metadata = task["tasks"][wanted.name].get_config("metadata") or {}
            details |= {key: metadata[key] for key in ("signatures",) if key in metadata}
        return TaskResult(
            task=wanted.name,
            suite=wanted.suite,
            metrics=metrics_of(wanted.name, task, found),
            rows=sum(count["effective"] for count in counts),
            rows_in_all=sum(count["original"] for count in counts),
            seconds=time.monotonic() - started,
            details=details,
        )

    new_tokens = [
        new_tokens_of(one.get_config("generation_kwargs"))
        for one in task["tasks"].values()
        if one.get_config("output_type") == "generate_until"
    ]
    return Job(wanted, settings.asked(), evaluate, new_tokens=max(new_tokens, default=0))


def _warn_of_ignored(
    name: str, settings: EvalSettings, shots: Set[int] | None, reporter: Reporter
) -> None:
    """Warns of settings that a task ignores.

    Args:
      name: Name of the task.
      settings: Settings of the evaluation.
      shots: Numbers of examples of its subtasks; None if it has none.
      reporter: Shows the warnings.
    """
    if settings.num_fewshot is not None and shots != {settings.num_fewshot}:
        reporter.warn(f"{name} ignores --num_fewshot: its number of examples is fixed")
    if settings.prompts == "trained" and not has_trained_prompts(name):
        reporter.warn(f"{name} ignores --prompts=trained: it has only its own prompts")
    if settings.data is not None and not reads_local_data(name):
        reporter.warn(f"{name} ignores --data: only this project's tasks read local data")


def _check_lengths(jobs: Sequence[Job], longest: int) -> None:
    """Rejects tasks whose completions leave no room for prompts, with ValueError."""
    for job in jobs:
        try:
            check_room(job.new_tokens, longest)
        except ValueError as error:
            raise ValueError(f"{job.wanted.name}: {error}") from error


def _evaluate(job: Job, model: HarnessModel, reporter: Reporter) -> TaskResult:
    result = job.evaluate(model)
    if truncated := result.details.get("truncated"):
        reporter.warn(
            f"{job.wanted.name}: {truncated:,} requests exceeded the maximum length of"
            f" {model.max_length:,} tokens and were truncated on the left"
        )
    return dataclasses.replace(result, details={**result.details, "asked": dict(job.asked)})


def _done(job: Job, results: Mapping[str, TaskResult], reporter: Reporter) -> bool:
    """Returns whether a task's result, with the same settings, already exists."""
    before = results.get(job.wanted.name)
    if before is None or before.details.get("asked") != job.asked:
        return False
    if before.details.get("incomplete"):
        return False
    reporter.say(f"{job.wanted.name}: already done")
    return True


def _ordered(
    results: Mapping[str, TaskResult], wanted: Sequence[Wanted]
) -> tuple[list[TaskResult], list[dict[str, Any]]]:
    """Returns the results, the requested ones first and in order, and the suites' averages."""
    names = dict.fromkeys([item.name for item in wanted if item.name in results])
    ordered = [results[name] for name in [*names, *(n for n in results if n not in names)]]
    return ordered, averages(ordered, [*wanted, *(Wanted(r.task, r.suite) for r in ordered)])
