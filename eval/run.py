"""One evaluation: tasks are built and checked, the model is loaded, and task after task done."""

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
from .json_files import not_one, read_object
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
"""Evaluates one task that has been built."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One task, built and checked.

    Attributes:
      wanted: the task.
      asked: what its result depends on besides the model, as JSON can hold it.
      evaluate: does it.
      needs_chat: whether it is a conversation, which takes a chat template.
      new_tokens: the most new tokens of an answer; 0 where none is written.
    """

    wanted: Wanted
    asked: Mapping[str, Any]
    evaluate: Evaluate
    needs_chat: bool = False
    new_tokens: int = 0


Maker = Callable[[Wanted, Path], Job]
"""Builds a task that is not the harness's, given where its files go."""


_MOVE = "Move the folder away, or give another one with --output"
_REMOVE = (
    "Remove it and give the same command again: it is written anew from the answers in"
    " responses.jsonl, or give another --output"
)


class OutputFolder:
    """The folder that an evaluation writes to.

    identity.json     the model, and how it is computed
    results.json      every number
    results.md        the same as a table
    responses.jsonl   what the model has answered, to go on from
    samples/          by task, each row's prompt, answers and scores

    Args:
      path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Notes whose results these are.

        Raises:
          RefusedError: the folder holds another model's.
        """
        file = self.path / "identity.json"
        if file.is_file():
            before = read_object(file, "what an evaluation notes of its model", _MOVE)
            differing = [
                f"  {key}: {before.get(key)!r} there, {identity.get(key)!r} now"
                for key in sorted({*before, *identity})
                if before.get(key) != identity.get(key)
            ]
            if differing:
                raise RefusedError(
                    f"{self.path} holds the evaluation of another model, or of this one before it"
                    " changed:\n"
                    + "\n".join(differing)
                    + "\nGive a folder of its own with --output"
                )
            return
        if self.path.is_dir() and any(self.path.glob("results.*")):
            raise RefusedError(
                f"{self.path} holds results of something else: give another --output"
            )
        write_json(file, dict(identity))

    def read(self) -> dict[str, TaskResult]:
        """The results so far, by task.

        Raises:
          RefusedError: the file is cut off, or none of this command's.
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
            raise not_one(file, what, error, _REMOVE) from error
        return {result.task: result for result in results}

    def write(self, results: Sequence[TaskResult], means: Sequence[Mapping[str, Any]]) -> None:
        """Writes the results, whole or not at all."""
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
    """Evaluates, and writes the results.

    Args:
      settings: what is evaluated.
      makers: builds HumanEval and MT-Bench, by name.
      reporter: says what goes on.
      allow_unsafe: whether tasks of the harness that run generated code in this process are run.

    Returns:
      The results as a table.

    Raises:
      RefusedError: something that was asked for cannot be done; nothing has been evaluated.
    """
    reporter = reporter or Reporter()
    folder = OutputFolder(settings.output_folder)
    with locked(folder.path / ".lock", "--output"):
        try:
            _ = settings.source  # A run that is not finished is refused before data are fetched.
            jobs = _build(settings, makers or {}, folder, reporter, allow_unsafe)
            files = find_model(settings)
            if any(job.needs_chat for job in jobs) and not files.tokenizer.chat_template:
                raise ValueError(
                    f"{MT_BENCH} is a conversation, and the tokenizer of {files.model} has no chat"
                    " template: name a file with one in --chat_template"
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
    """Every task, with its data; those of a suite that a local folder lacks are left out, aloud."""
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
            raise ValueError(f"{settings.data} has none of {suite}'s data: {why[suite]}")
        reporter.warn(f"{settings.data} lacks data of {suite}, left out: {', '.join(names)}")
    return jobs


def _manager(names: Sequence[str]) -> TaskManager:
    """Returns the harness's tasks; those known here alone, where no others are named.

    Reading all of the harness's thousands of configurations takes many seconds, which a slip in a
    name is not made to wait for.

    Raises:
      ValueError: A name is not known.
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
            f"{', '.join(unsafe)} runs generated code in this very process, without a sandbox;"
            " humaneval of this project runs it in one. To run it all the same, give"
            " --allow_unisolated_code"
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
    """Says which settings a task has no use for.

    Args:
      name: the task.
      settings: what was asked for.
      shots: how many examples its parts put before a question; None where it has none.
      reporter: is told.
    """
    if settings.num_fewshot is not None and shots != {settings.num_fewshot}:
        reporter.warn(f"{name}: --num_fewshot is left aside, its number of examples is fixed")
    if settings.prompts == "trained" and not has_trained_prompts(name):
        reporter.warn(f"{name}: --prompts=trained is left aside, it has its own prompts only")
    if settings.data is not None and not reads_local_data(name):
        reporter.warn(f"{name}: only this project's tasks read --data; its data are the harness's")


def _check_lengths(jobs: Sequence[Job], longest: int) -> None:
    """Raises ValueError, naming the task, unless every task's answers leave room for prompts."""
    for job in jobs:
        try:
            check_room(job.new_tokens, longest)
        except ValueError as error:
            raise ValueError(f"{job.wanted.name}: {error}") from error


def _evaluate(job: Job, model: HarnessModel, reporter: Reporter) -> TaskResult:
    result = job.evaluate(model)
    if truncated := result.details.get("truncated"):
        reporter.warn(
            f"{job.wanted.name}: {truncated:,} requests were longer than the {model.max_length:,}"
            " tokens that fit, and lost their beginnings"
        )
    return dataclasses.replace(result, details={**result.details, "asked": dict(job.asked)})


def _done(job: Job, results: Mapping[str, TaskResult], reporter: Reporter) -> bool:
    """Whether a task's result is there, of the same settings."""
    before = results.get(job.wanted.name)
    if before is None or before.details.get("asked") != job.asked:
        return False
    if before.details.get("incomplete"):
        return False
    reporter.say(f"{job.wanted.name}: done before")
    return True


def _ordered(
    results: Mapping[str, TaskResult], wanted: Sequence[Wanted]
) -> tuple[list[TaskResult], list[dict[str, Any]]]:
    """The results, those asked for first and in their order; and the suites' means."""
    names = dict.fromkeys([item.name for item in wanted if item.name in results])
    ordered = [results[name] for name in [*names, *(n for n in results if n not in names)]]
    return ordered, averages(ordered, [*wanted, *(Wanted(r.task, r.suite) for r in ordered)])
