"""Evaluates HumanEval: generates completions, tests them in the sandbox, and computes pass@k."""

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
    """Settings of HumanEval.

    Attributes:
      allowed: Whether generated code may run.
      unisolated: Whether it may run without isolation.
      samples: Number of completions per problem.
      pass_at: Values of k in pass@k.
      temperature: Sampling temperature; None: 0 for one sample and 0.8 for several. The paper uses
        0.8 for many samples and 0.2 for pass@1.
      limits: Resource limits of each completion.
      workers: Number of programs that run at once; 0: up to four.

    Raises:
      ValueError: A value is invalid, or the temperature is 0 for several samples.
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
                    f"pass@{k} needs at least {k} samples per problem, but --samples_per_problem is"
                    f" {self.samples}"
                )
        if not self.pass_at:
            raise ValueError("pass_at is empty; give --pass_at=1")
        if self.temperature is not None:
            check_finite("temperature", self.temperature)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature is 0, at which all {self.samples} samples are the same; give a"
                " --temperature above 0"
            )

    @property
    def sampling_temperature(self) -> float:
        """Returns the temperature, or its default."""
        if self.temperature is not None:
            return self.temperature
        return 0.8 if self.samples > 1 else 0.0


def make_job(wanted: Wanted, folder: Path, settings: EvalSettings, code: HumanEvalSettings) -> Job:
    """Builds and checks the HumanEval task.

    Args:
      wanted: Name and suite of the task.
      folder: Output folder of the evaluation.
      settings: Settings of the evaluation.
      code: Settings of HumanEval.

    Raises:
      ValueError: Running code is not allowed, or cannot be isolated.
    """
    if not code.allowed:
        raise ValueError(
            "humaneval runs code that the model generates; give --allow_code_execution to allow it"
            " (it runs in a sandbox: docs/evaluation.md)"
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
            f"humaneval: {error}. Give --allow_unisolated_code to run it without isolation, with"
            " your user's permissions"
        ) from error
    asked = {**settings.asked(), "samples": code.samples, "pass_at": list(code.pass_at)}
    asked |= {"temperature": code.sampling_temperature, "isolated": not code.unisolated}
    # Results from when a completion ran in the process of its test are computed again.
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
    r"""Returns the code of a completion, which a chat ends with the fence of the prompt.

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
    """Returns the completions of each problem."""
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
    """Returns the outcomes of each problem's completions; equal programs run once."""
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
    """Returns the key of an outcome in `ResponseStore`."""
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
