"""The evaluation: both turns are answered, both answers rated, ratings averaged."""

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
from .budget import Budget
from .files import Benchmark, Question, read_benchmark
from .judges import (
    JUDGMENT_TOKENS,
    EndpointJudge,
    HopelessJudgeError,
    Judge,
    JudgeError,
    LocalJudge,
    UnreadableAnswerError,
    check_judge_tokenizer,
)
from .rating import find_rating
from .requests import JudgeRequest, estimate, judge_requests

QUESTIONS = 80
"""How many questions MT-Bench has; a rating of fewer is not called by its name."""

_LOCAL = "local:"
_NEW_TOKENS = 1024
_CHARACTERS_A_TOKEN = 4
_GIVE_UP_AFTER = 8
"""So many requests in a row without an answer, each with all its retries, and the rest is left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTBenchSettings:
    """Who judges, and at what cost.

    Attributes:
      judge: the address of an endpoint that speaks OpenAI's protocol, up to and with its version;
        or "local:" and the folder of a checkpoint.
      model: the model that the endpoint is asked for.
      key: the secret it is asked with; empty: none.
      options: further fields of each request to the endpoint; None takes one away.
      prices: of a million tokens of prompts, and of answers.
      budget: what the judge may cost at most in one evaluation, by those prices.
      retries: how often a request is made again that failed for a passing reason.
      workers: how many requests are made at a time.

    Raises:
      ValueError: no judge, or a value that cannot be.
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
            raise ValueError(f"judge_retries must be at least 0, but is {self.retries}")
        if self.prices is not None:
            if len(self.prices) != 2:
                raise ValueError(
                    "judge_prices: give two, of a million tokens of prompts and of answers, 2.5,10"
                )
            for price in self.prices:
                check_finite("judge_prices", price)
        if self.budget is not None:
            check_positive("judge_budget", self.budget)
            check_finite("judge_budget", self.budget)
            if self.prices is None:
                raise ValueError("judge_budget cannot be kept without judge_prices")
            if self.most_tokens is None:
                raise ValueError(
                    "judge_budget cannot be kept where answers have no limit: give one in"
                    " --judge_options, as max_tokens or max_completion_tokens"
                )

    @property
    def most_tokens(self) -> int | None:
        """How many tokens a judgment may have; None where the options take the limit away."""
        given = {"max_tokens": JUDGMENT_TOKENS, **self.options}
        limits = [given.get(name) for name in ("max_tokens", "max_completion_tokens")]
        return max((limit for limit in limits if isinstance(limit, int)), default=None)

    def make_judge(self) -> Callable[[], Judge]:
        """What makes the judge; that it can be had is checked now, and a model is loaded later.

        Raises:
          ValueError: there is no judge, or it cannot be had.
        """
        if not self.judge:
            raise ValueError(
                "mt_bench has its answers rated by a judge: give --judge, the address of an"
                " endpoint (with --judge_model) or local:FOLDER"
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
    """MT-Bench, checked and ready.

    Args:
      wanted: the task.
      folder: where its samples go.
      settings: of the evaluation.
      judging: who judges.
      reporter: is told what it will cost.

    Raises:
      ValueError: the judge or FastChat's files cannot be had, or the budget does not suffice.
    """
    if settings.data is None:
        raise ValueError(
            "mt_bench reads FastChat's files (question.jsonl, judge_prompts.jsonl, the reference"
            " answers), which are not part of this project: give --data with a folder mt_bench"
        )
    benchmark = read_benchmark(local_folder(settings.data, "mt_bench"))
    questions = _limited(benchmark.questions, settings.limit)
    make_judge = judging.make_judge()
    most = settings.max_new_tokens or _NEW_TOKENS
    longest = _longest_requests(benchmark, questions, most)
    will_cost = estimate(longest, judging.prices, judging.most_tokens)
    reporter.say(f"mt_bench: with answers as long as they may be, {will_cost}")

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
            why = next(iter(failures.values()), "no judgment has one in the form asked for")
            raise HopelessJudgeError(f"none of {len(requests)} answers has a rating: {why}")
        unread = len(judgments) - len(ratings)
        if failures or unread:
            reporter.warn(
                f"mt_bench: of {len(requests)} ratings, {len(failures)} were not given"
                f" ({next(iter(failures.values()), '')}) and {unread} could not be read;"
                " the rest are averaged"
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
    """The first so many questions, or a share of them."""
    if limit is None:
        return list(questions)
    return list(questions[: max(1, round(len(questions) * limit)) if limit < 1 else int(limit)])


def _longest_requests(
    benchmark: Benchmark, questions: Sequence[Question], new_tokens: int
) -> list[JudgeRequest]:
    """The requests as they are if all answers are as long as they may be."""
    answer = "x" * (new_tokens * _CHARACTERS_A_TOKEN)
    return [
        request
        for question in questions
        for request in judge_requests(benchmark, question, (answer, answer))
    ]


def _answer(
    model: HarnessModel, questions: Sequence[Question], settings: EvalSettings
) -> dict[int, list[str]]:
    """By question, the model's answers to both turns, at the category's temperature."""
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
"""A question and a turn."""


def _judge(
    model: HarnessModel,
    judge: Judge,
    requests: Sequence[JudgeRequest],
    judging: MTBenchSettings,
    reporter: Reporter,
) -> tuple[dict[_Key, str], dict[_Key, str]]:
    """The judgments, and why there is none where there is none."""
    judgments: dict[_Key, str] = {}
    for request in requests:
        known = model.store.get(*_judgment_key(judge, judging, request))
        if known is not None:
            judgments[request.question, request.turn] = known
    waiting = [one for one in requests if (one.question, one.turn) not in judgments]
    cost = estimate(waiting, judging.prices, judging.most_tokens)
    reporter.say(f"mt_bench: {cost}")
    if judging.budget is not None and (cost.cost or 0.0) > judging.budget:
        raise HopelessJudgeError(
            f"the judge would cost about {cost.cost:.2f}, and judge_budget is {judging.budget:g};"
            " the answers are kept, and nothing has been asked of the judge"
        )
    budget = Budget(judging.budget, judging.prices, judging.most_tokens)
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
            except HopelessJudgeError:
                raise
            except JudgeError as error:
                if not isinstance(error, UnreadableAnswerError):
                    budget.not_answered(request)
                failures[key] = str(error)
                in_a_row += 1
                if in_a_row >= _GIVE_UP_AFTER:
                    raise HopelessJudgeError(
                        f"{in_a_row} requests in a row have failed, the last: {error}. What has"
                        " been rated is kept; the same command goes on from there"
                    ) from error
            else:
                in_a_row = 0
                judgments[key] = judgment.text
                budget.answered(request, judgment)
                model.store.add(judgment.text, *_judgment_key(judge, judging, request))
            counter.advance()
    if left := len(requests) - len(judgments) - len(failures):
        raise HopelessJudgeError(
            f"judge_budget is {judging.budget:g}, {budget.spent:.2f} of it is spent, and one more"
            f" answer might go over it: {left} of {len(requests)} ratings are left. What has been"
            " rated is kept; the same command goes on from there with the same budget again, and"
            " a larger one gets further"
        )
    return judgments, failures


def _judgment_key(judge: Judge, judging: MTBenchSettings, request: JudgeRequest) -> tuple[str, ...]:
    """What a judgment depends on, for `ResponseStore`."""
    options = json.dumps(dict(judging.options), sort_keys=True)
    return ("judge", judge.name, judging.judge, options, request.system, request.prompt)


def _metrics(
    requests: Sequence[JudgeRequest], ratings: Mapping[_Key, float], judge: str, questions: int
) -> tuple[Metric, ...]:
    """The mean rating: of all, of each turn, of each category.

    A question's two ratings go together: the value is the mean of questions' means, and the
    standard error is that of this mean. Where all ratings are there it is the mean of them too.
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
