"""Evaluates MT-Bench: generates both answers, has a judge rate them, and averages the ratings."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.core.validation import check_finite, check_positive, check_positive_int
from peft_jax.generation import load_for_generation
from peft_jax.hub import find_folder
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.runtime.files import write_text
from peft_jax.runtime.progress import Reporter

from ..humaneval.pass_at_k import mean_and_standard_error
from ..json_lines import json_line
from ..model import HarnessModel
from ..parallel import as_done
from ..results import Metric, TaskResult
from ..run import Job
from ..settings import EvalSettings
from ..tasks.local_data import local_folder
from ..tasks.names import Wanted
from .benchmark_files import Benchmark, Question, read_benchmark
from .judge_budget import Budget
from .judges import (
    JUDGMENT_TOKENS,
    EndpointJudge,
    FatalJudgeError,
    Judge,
    JudgeError,
    LocalJudge,
    UnreadableAnswerError,
    check_judge_tokenizer,
)
from .rating import find_rating
from .requests import JudgeRequest, estimate, judge_requests

QUESTIONS = 80
"""Number of questions; an average over fewer is not reported as MT-Bench."""

_LOCAL = "local:"
_NEW_TOKENS = 1024
_CHARACTERS_A_TOKEN = 4
_GIVE_UP_AFTER = 8
"""Number of consecutive failed requests, after all retries, that end the evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTBenchSettings:
    """Settings of the judge and its cost.

    Attributes:
      judge: URL of an endpoint with OpenAI's protocol, up to the version; or "local:" and the
        folder of a checkpoint.
      model: Endpoint's name of the model.
      key: Secret to send to the endpoint; empty: none.
      options: Further fields of each request to the endpoint; None removes a field.
      prices: Prices per million prompt tokens and per million completion tokens.
      budget: Maximum cost of the judge in one evaluation, at those prices.
      retries: Retries of a request after a transient failure.
      workers: Number of concurrent requests.

    Raises:
      ValueError: A value is invalid.
    """

    judge: str = ""
    model: str = ""
    key: str = dataclasses.field(default="", repr=False)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prices: tuple[float, float] | None = None
    budget: float | None = None
    retries: int = 5
    workers: int = 4

    def __post_init__(self) -> None:
        check_positive_int("judge_workers", self.workers)
        if self.retries < 0:
            raise ValueError(f"judge_retries is {self.retries} but must be at least 0")
        if self.prices is not None:
            if len(self.prices) != 2:
                raise ValueError(
                    f"judge_prices has {len(self.prices)} values but must have two, per million"
                    " prompt tokens and per million completion tokens, for example 2.5,10"
                )
            for price in self.prices:
                check_finite("judge_prices", price)
        if self.budget is not None:
            check_positive("judge_budget", self.budget)
            check_finite("judge_budget", self.budget)
            if self.prices is None:
                raise ValueError(
                    f"judge_budget is {self.budget:g}, which needs prices; give --judge_prices"
                )
            if self.max_tokens is None:
                raise ValueError(
                    f"judge_budget is {self.budget:g}, which needs a limit on judgments; give"
                    " max_tokens or max_completion_tokens in --judge_options"
                )

    @property
    def max_tokens(self) -> int | None:
        """Returns the maximum tokens of a judgment; None if the options remove the limit."""
        given = {"max_tokens": JUDGMENT_TOKENS, **self.options}
        limits = [given.get(name) for name in ("max_tokens", "max_completion_tokens")]
        return max((limit for limit in limits if isinstance(limit, int)), default=None)

    def make_judge(self) -> Callable[[], Judge]:
        """Checks the judge, and returns a function that loads it.

        Raises:
          ValueError: No judge is named, or it cannot be used.
        """
        if not self.judge:
            raise ValueError(
                "mt_bench needs a judge; give --judge, the URL of an endpoint (with --judge_model)"
                " or local:FOLDER"
            )
        if self.judge.startswith(_LOCAL):
            folder = find_folder(self.judge.removeprefix(_LOCAL))
            check_judge_tokenizer(load_tokenizer(folder), str(folder))
            return lambda: LocalJudge(load_for_generation(folder), folder.resolve().name)
        judge = EndpointJudge(
            url=self.judge,
            name=self.model,
            key=self.key,
            options=self.options,
            retries=self.retries,
            workers=self.workers,
        )
        try:
            judge.check()
        except JudgeError as error:
            raise ValueError(str(error)) from error
        return lambda: judge


def make_job(
    wanted: Wanted,
    folder: Path,
    settings: EvalSettings,
    judging: MTBenchSettings,
    reporter: Reporter,
) -> Job:
    """Builds and checks the MT-Bench task.

    Args:
      wanted: Name and suite of the task.
      folder: Output folder of the evaluation.
      settings: Settings of the evaluation.
      judging: Settings of the judge.
      reporter: Shows the estimated cost.

    Raises:
      ValueError: The judge or FastChat's files cannot be used.
    """
    if settings.data is None:
        raise ValueError(
            "mt_bench needs FastChat's files (question.jsonl, judge_prompts.jsonl, the reference"
            " answers), which this project does not include; give a --data folder with mt_bench/"
        )
    benchmark = read_benchmark(local_folder(settings.data, "mt_bench"))
    questions = _limited(benchmark.questions, settings.limit)
    make_judge = judging.make_judge()
    most = settings.max_new_tokens or _NEW_TOKENS
    longest = _longest_requests(benchmark, questions, most)
    will_cost = estimate(longest, judging.prices, judging.max_tokens)
    reporter.say(f"mt_bench: with answers of maximum length, {will_cost}")

    def evaluate(model: HarnessModel) -> TaskResult:
        started = time.monotonic()
        model.truncated = 0
        answers = _answer(model, questions, settings)
        requests = [
            request
            for question in questions
            for request in judge_requests(benchmark, question, answers[question.id])
        ]
        judge = make_judge()
        judgments, failures = _judge(model, judge, requests, judging, reporter)
        ratings = {
            key: rating
            for key, judgment in judgments.items()
            if (rating := find_rating(judgment)) is not None
        }
        _write_samples(folder / "samples" / f"{wanted.name}.jsonl", requests, answers, judgments)
        if not ratings:
            why = next(iter(failures.values()), "no judgment contains a rating such as [[5]]")
            raise FatalJudgeError(f"none of {len(requests)} answers has a rating: {why}")
        unread = len(judgments) - len(ratings)
        if failures or unread:
            reporter.warn(
                f"mt_bench: of {len(requests)} ratings, {len(failures)} are missing"
                f" ({next(iter(failures.values()), '')}) and {unread} could not be read;"
                " the others are averaged"
            )
        return TaskResult(
            task=wanted.name,
            suite=wanted.suite,
            metrics=_metrics(requests, ratings, judge.name, len(questions)),
            rows=len(questions),
            rows_in_all=len(benchmark.questions),
            seconds=time.monotonic() - started,
            details={
                "judge": judge.name,
                "ratings": len(ratings),
                "not_given": len(failures),
                "unreadable": unread,
                "incomplete": bool(failures),
                "truncated": model.truncated,
            },
        )

    asked = {**settings.asked(), "judge": judging.judge, "judge_model": judging.model}
    asked["judge_options"] = dict(judging.options)
    return Job(wanted, asked, evaluate, needs_chat=True, new_tokens=most)


def _limited(questions: Sequence[Question], limit: float | None) -> list[Question]:
    """Returns the first `limit` questions, or a fraction of them."""
    if limit is None:
        return list(questions)
    return list(questions[: max(1, round(len(questions) * limit)) if limit < 1 else int(limit)])


def _longest_requests(
    benchmark: Benchmark, questions: Sequence[Question], new_tokens: int
) -> list[JudgeRequest]:
    """Returns requests with answers of maximum length, to estimate the cost."""
    answer = "x" * (new_tokens * _CHARACTERS_A_TOKEN)
    return [
        request
        for question in questions
        for request in judge_requests(benchmark, question, (answer, answer))
    ]


def _answer(
    model: HarnessModel, questions: Sequence[Question], settings: EvalSettings
) -> dict[int, list[str]]:
    """Returns the model's answers to both turns of each question."""
    begin = [{"role": "system", "content": settings.system}] if settings.system else []
    chats = {question.id: list(begin) for question in questions}
    answers: dict[int, list[str]] = {question.id: [] for question in questions}
    for turn in (0, 1):
        requests = []
        for question in questions:
            chats[question.id].append({"role": "user", "content": question.turns[turn]})
            generation = model.settings_of(
                {
                    "until": [],
                    "max_gen_toks": settings.max_new_tokens or _NEW_TOKENS,
                    "do_sample": question.temperature > 0,
                    "temperature": question.temperature,
                }
            )
            requests.append((model.apply_chat_template(chats[question.id]), generation))
        for question, text in zip(questions, model.complete(requests), strict=True):
            answers[question.id].append(text.strip())
            chats[question.id].append({"role": "assistant", "content": text.strip()})
    return answers


_Key = tuple[int, int]
"""Number of the question, and turn."""


def _judge(
    model: HarnessModel,
    judge: Judge,
    requests: Sequence[JudgeRequest],
    judging: MTBenchSettings,
    reporter: Reporter,
) -> tuple[dict[_Key, str], dict[_Key, str]]:
    """Returns the judgments, and the messages of failed requests."""
    judgments: dict[_Key, str] = {}
    for request in requests:
        known = model.store.get(*_judgment_key(judge, judging, request))
        if known is not None:
            judgments[request.question, request.turn] = known
    waiting = [one for one in requests if (one.question, one.turn) not in judgments]
    cost = estimate(waiting, judging.prices, judging.max_tokens)
    reporter.say(f"mt_bench: {cost}")
    if judging.budget is not None and (cost.cost or 0.0) > judging.budget:
        raise FatalJudgeError(
            f"the judge would cost about {cost.cost:.2f}, but judge_budget is {judging.budget:g};"
            " no request was sent, and the answers are kept for a run with a larger budget"
        )
    budget = Budget(judging.budget, judging.prices, judging.max_tokens)
    failures: dict[_Key, str] = {}
    in_a_row = 0
    with (
        reporter.counting("ratings", len(waiting)) as counter,
        contextlib.closing(
            as_done(judge, waiting, workers=judge.workers, may_begin=budget.may_begin)
        ) as outcomes,
    ):
        for request, done in outcomes:
            key = (request.question, request.turn)
            try:
                judgment = done.result()
            except FatalJudgeError:
                raise
            except JudgeError as error:
                if not isinstance(error, UnreadableAnswerError):
                    budget.not_answered(request)
                failures[key] = str(error)
                in_a_row += 1
                if in_a_row >= _GIVE_UP_AFTER:
                    raise FatalJudgeError(
                        f"{in_a_row} consecutive requests failed, the last with: {error}. Ratings"
                        " so far are kept; the same command resumes from there"
                    ) from error
            else:
                in_a_row = 0
                judgments[key] = judgment.text
                budget.answered(request, judgment)
                model.store.add(judgment.text, *_judgment_key(judge, judging, request))
            counter.advance()
    if left := len(requests) - len(judgments) - len(failures):
        raise FatalJudgeError(
            f"judge_budget is {judging.budget:g}, of which {budget.spent:.2f} is spent, and one"
            f" more request might exceed it; {left} of {len(requests)} ratings are missing. Ratings"
            " so far are kept; the same command resumes from there, with a new budget of this size"
        )
    return judgments, failures


def _judgment_key(judge: Judge, judging: MTBenchSettings, request: JudgeRequest) -> tuple[str, ...]:
    """Returns the key of a judgment in `ResponseStore`."""
    options = json.dumps(dict(judging.options), sort_keys=True)
    return ("judge", judge.name, judging.judge, options, request.system, request.prompt)


def _metrics(
    requests: Sequence[JudgeRequest], ratings: Mapping[_Key, float], judge: str, questions: int
) -> tuple[Metric, ...]:
    """Returns the mean rating: overall, by turn, and by category.

    The two ratings of a question are not independent. The value is therefore the mean of the
    questions' means, with its standard error.
    """
    whole = questions == QUESTIONS and len(ratings) == len(requests)

    def metric(name: str, chosen: Sequence[JudgeRequest]) -> Metric | None:
        by_question: dict[int, list[float]] = {}
        for one in chosen:
            rating = ratings.get((one.question, one.turn))
            if rating is not None:
                by_question.setdefault(one.question, []).append(rating)
        if not by_question:
            return None
        means = [sum(some) / len(some) for some in by_question.values()]
        value, error = mean_and_standard_error(means)
        count = sum(map(len, by_question.values()))
        variant = f"judge: {judge}"
        if count < len(chosen):
            variant += f"; {count} of {len(chosen)} ratings"
        return Metric(name=name, variant=variant, value=value, standard_error=error)

    categories = dict.fromkeys(request.category for request in requests)
    found = [
        metric("MT-Bench" if whole else "rating", requests),
        *(metric(f"turn {n}", [one for one in requests if one.turn == n]) for n in (1, 2)),
        *(metric(c, [one for one in requests if one.category == c]) for c in categories),
    ]
    return tuple(one for one in found if one is not None)


def _write_samples(
    file: Path,
    requests: Sequence[JudgeRequest],
    answers: Mapping[int, Sequence[str]],
    judgments: Mapping[_Key, str],
) -> None:
    lines = []
    for request in requests:
        judgment = judgments.get((request.question, request.turn))
        record = {
            "question_id": request.question,
            "category": request.category,
            "turn": request.turn,
            "answer": answers[request.question][request.turn - 1],
            "judgment": judgment,
            "rating": None if judgment is None else find_rating(judgment),
        }
        lines.append(json_line(record))
    write_text(file, "".join(lines))
