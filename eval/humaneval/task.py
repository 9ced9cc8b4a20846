"""The evaluation: completions are generated, run in the sandbox, and counted."""

import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from peft_jax.core.validation import check_finite, check_positive_int
from peft_jax.runtime.files import write_text

from ..json_lines import json_line
from ..model import HarnessModel
from ..parallel import as_done
from ..results import Metric, TaskResult
from ..run import Job
from ..sandbox import IsolationError, Outcome, Sandbox, SandboxLimits, TestedProgram
from ..settings import EvalSettings
from ..tasks.names import Wanted
from .pass_at_k import mean_and_standard_error, pass_at_k
from .problems import Problem, open_problems

_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_NEW_TOKENS = 1024
_TOP_P = 0.95

_REQUEST = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{prompt}\n```\n"
)
_BEGIN = "Here is the completed function:\n```python\n{prompt}\n"
_FENCE = "```"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HumanEvalSettings:
    """How HumanEval is evaluated.

    Attributes:
      allowed: whether generated code may be run at all.
      unisolated: whether it may be run where it cannot be kept apart.
      samples: completions of each problem.
      pass_at: the k of pass@k.
      temperature: of sampling; None: 0 for one sample, 0.8 for several, as the paper has it for
        many samples (0.2 is its choice for pass@1).
      limits: what each completion may take.
      workers: how many run at a time.

    Raises:
      ValueError: a value that cannot be, or one temperature 0 for several samples.
    """

    allowed: bool = False
    unisolated: bool = False
    samples: int = 1
    pass_at: tuple[int, ...] = (1,)
    temperature: float | None = None
    limits: SandboxLimits = dataclasses.field(default_factory=SandboxLimits)
    workers: int = 0

    def __post_init__(self) -> None:
        check_positive_int("samples_per_problem", self.samples)
        for k in self.pass_at:
            check_positive_int("pass_at", k)
            if k > self.samples:
                raise ValueError(
                    f"pass@{k} takes at least {k} samples of each problem, and there are"
                    f" {self.samples}: give --samples_per_problem"
                )
        if not self.pass_at:
            raise ValueError("pass_at names no k of pass@k: give --pass_at=1")
        if self.temperature is not None:
            check_finite("temperature", self.temperature)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 are all the same: give it above 0")

    @property
    def sampling_temperature(self) -> float:
        """The temperature, given or not."""
        if self.temperature is not None:
            return self.temperature
        return 0.8 if self.samples > 1 else 0.0


def make_job(wanted: Wanted, folder: Path, settings: EvalSettings, code: HumanEvalSettings) -> Job:
    """HumanEval, checked and ready.

    Args:
      wanted: the task.
      folder: where its samples go.
      settings: of the evaluation.
      code: how completions are made and run.

    Raises:
      ValueError: running code is not allowed, or it cannot be kept apart.
    """
    if not code.allowed:
        raise ValueError(
            "humaneval runs code that the model has written; to allow that, give"
            " --allow_code_execution (it runs in a sandbox: docs/evaluation.md)"
        )
    problems = open_problems(settings.data)
    count = len(problems)
    if settings.limit is not None:
        limit = settings.limit
        problems = problems[: max(1, round(count * limit)) if limit < 1 else int(limit)]
    sandbox = Sandbox(code.limits, isolated=not code.unisolated)
    try:
        sandbox.check()
    except IsolationError as error:
        raise ValueError(
            f"humaneval: {error}. To run it all the same, with the rights of your user, give"
            " --allow_unisolated_code"
        ) from error
    asked = {**settings.asked(), "samples": code.samples, "pass_at": list(code.pass_at)}
    asked |= {"temperature": code.sampling_temperature, "isolated": not code.unisolated}
    # Results from before tests ran in a process of their own are taken anew.
    asked |= {"code_limits": dataclasses.asdict(code.limits), "tests": "in a process of their own"}

    def evaluate(model: HarnessModel) -> TaskResult:
        started = time.monotonic()
        model.truncated = 0
        completions = _complete(model, problems, settings, code)
        outcomes = _run(model, problems, completions, sandbox, code)
        _write_samples(folder / "samples" / f"{wanted.name}.jsonl", problems, completions, outcomes)
        return TaskResult(
            task=wanted.name,
            suite=wanted.suite,
            metrics=tuple(_metric(k, outcomes) for k in code.pass_at),
            rows=len(problems),
            rows_in_all=count,
            seconds=time.monotonic() - started,
            details={
                "num_fewshot": 0,
                "samples": code.samples,
                "verdicts": dict(Counter(one.verdict for some in outcomes for one in some)),
                "truncated": model.truncated,
            },
        )

    return Job(wanted, asked, evaluate, new_tokens=settings.max_new_tokens or _NEW_TOKENS)


def extract(completion: str, *, chat: bool) -> str:
    r"""The code of a completion; in a chat it ends with the fence that was opened for it.

    Example:
      >>> extract("    return 1\n```\nThis returns 1.", chat=True)
      '    return 1\n'
    """
    return completion.partition(_FENCE)[0] if chat else completion


def _complete(
    model: HarnessModel,
    problems: list[Problem],
    settings: EvalSettings,
    code: HumanEvalSettings,
) -> list[list[str]]:
    """By problem, its completions."""
    temperature = code.sampling_temperature
    generation = model.settings_of(
        {
            "until": list(_STOPS),
            "max_gen_toks": settings.max_new_tokens or _NEW_TOKENS,
            "do_sample": temperature > 0,
            "temperature": temperature,
            "top_p": _TOP_P if temperature > 0 else 1.0,
        }
    )
    prompts = [_prompt(problem, model, settings) for problem in problems]
    requests = [(prompt, generation) for prompt in prompts for _ in range(code.samples)]
    texts = [extract(text, chat=settings.chat) for text in model.complete(requests)]
    return [texts[at : at + code.samples] for at in range(0, len(texts), code.samples)]


def _prompt(problem: Problem, model: HarnessModel, settings: EvalSettings) -> str:
    if not settings.chat:
        return problem.prompt
    turns = [
        {"role": "user", "content": _REQUEST.format(prompt=problem.prompt)},
        {"role": "assistant", "content": _BEGIN.format(prompt=problem.prompt)},
    ]
    if settings.system:
        turns.insert(0, {"role": "system", "content": settings.system})
    return model.apply_chat_template(turns, add_generation_prompt=False)


def _run(
    model: HarnessModel,
    problems: list[Problem],
    completions: list[list[str]],
    sandbox: Sandbox,
    code: HumanEvalSettings,
) -> list[list[Outcome]]:
    """By problem, what came of its completions; the same program is run once."""
    programs = [
        [problem.program(completion) for completion in some]
        for problem, some in zip(problems, completions, strict=True)
    ]
    different = list(dict.fromkeys(program for some in programs for program in some))
    found: dict[TestedProgram, Outcome] = {}
    for program in different:
        known = model.store.get(*_run_key(program, code))
        if known is not None:
            found[program] = Outcome(**known)
    waiting = [program for program in different if program not in found]
    workers = code.workers or min(4, os.cpu_count() or 1)
    stop = threading.Event()
    run = functools.partial(sandbox.run, stop=stop)
    with (
        model.reporter.counting("programs run", len(waiting)) as counter,
        contextlib.closing(as_done(run, waiting, workers=workers, stop=stop.set)) as outcomes,
    ):
        for program, done in outcomes:
            found[program] = done.result()
            record = dataclasses.asdict(found[program])
            model.store.add(record, *_run_key(program, code))
            counter.advance()
    return [[found[program] for program in some] for some in programs]


def _run_key(program: TestedProgram, code: HumanEvalSettings) -> tuple[Any, ...]:
    """Returns what an outcome depends on, for `ResponseStore`."""
    limits = dataclasses.asdict(code.limits)
    return ("run tested", dataclasses.asdict(program), limits, code.unisolated)


def _metric(k: int, outcomes: list[list[Outcome]]) -> Metric:
    values = [pass_at_k(len(some), sum(one.passed for one in some), k) for some in outcomes]
    value, error = mean_and_standard_error(values)
    return Metric(name=f"pass@{k}", value=value, standard_error=error)


def _write_samples(
    file: Path,
    problems: list[Problem],
    completions: list[list[str]],
    outcomes: list[list[Outcome]],
) -> None:
    records: list[dict[str, Any]] = [
        {"task_id": problem.task_id, "completion": completion, **dataclasses.asdict(outcome)}
        for problem, some, results in zip(problems, completions, outcomes, strict=True)
        for completion, outcome in zip(some, results, strict=True)
    ]
    write_text(file, "".join(map(json_line, records)))
