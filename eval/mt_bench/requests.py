"""Builds requests to the judge, and estimates their cost."""

import dataclasses
from collections.abc import Sequence

from .benchmark_files import Benchmark, Question

_CHARACTERS_A_TOKEN = 3.5
"""Below the average of English with common tokenizers, so that estimates are not too low."""

_JUDGMENT_TOKENS = 250
"""Average length of a judgment: a short explanation and the rating."""


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """Request to rate the answer of one turn.

    Attributes:
      question: Number of the question.
      category: Category of the question.
      turn: Turn, from 1.
      system: System message.
      prompt: User message.
    """

    question: int
    category: str
    turn: int
    system: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated size and cost of requests.

    Attributes:
      requests: Number of requests.
      prompt_tokens: Estimated prompt tokens.
      answer_tokens: Estimated completion tokens.
      max_answer_tokens: Maximum completion tokens; None without a limit.
      cost: Estimated cost in the currency of the prices; None without prices.
      max_cost: Maximum cost; None without prices or without a limit.
    """

    requests: int
    prompt_tokens: int
    answer_tokens: int
    max_answer_tokens: int | None
    cost: float | None
    max_cost: float | None

    def __str__(self) -> str:
        most = "" if self.max_answer_tokens is None else f" (at most {self.max_answer_tokens:,})"
        cost = "" if self.cost is None else f", about {self.cost:.2f} at the given prices"
        cost += "" if self.max_cost is None else f" (at most {self.max_cost:.2f})"
        return (
            f"{self.requests} requests to the judge, about {self.prompt_tokens:,} prompt tokens"
            f" and {self.answer_tokens:,}{most} completion tokens{cost}"
        )


def judge_requests(
    benchmark: Benchmark, question: Question, answers: Sequence[str]
) -> list[JudgeRequest]:
    """Returns the requests for both turns of a question, with FastChat's prompts.

    Args:
      benchmark: Contents of FastChat's files.
      question: Question to rate.
      answers: Answer of each turn.
    """
    with_reference = bool(question.reference)
    fields = {
        "question": question.turns[0],
        "answer": answers[0],
        "question_1": question.turns[0],
        "question_2": question.turns[1],
        "answer_1": answers[0],
        "answer_2": answers[1],
    }
    if with_reference:
        fields["ref_answer_1"], fields["ref_answer_2"] = question.reference
    requests = []
    for turn in (1, 2):
        prompt = benchmark.prompts[with_reference, turn]
        text = prompt.template.format(**fields)
        requests.append(JudgeRequest(question.id, question.category, turn, prompt.system, text))
    return requests


def price(tokens: tuple[int, int], prices: tuple[float, float]) -> float:
    """Returns the cost of prompt and completion tokens, at the prices per million of each."""
    return (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6


def estimate(
    requests: Sequence[JudgeRequest],
    prices: tuple[float, float] | None,
    max_tokens: int | None = None,
) -> Estimate:
    """Estimates the cost of requests.

    Args:
      requests: Requests to send.
      prices: Prices per million prompt tokens and per million completion tokens; None if unknown.
      max_tokens: Maximum tokens of a judgment; None without a limit.

    Example:
      >>> one = JudgeRequest(81, "writing", 1, "s" * 35, "p" * 315)
      >>> found = estimate([one] * 10, (10.0, 40.0), max_tokens=2048)
      >>> found.cost, round(found.max_cost, 4)
      (0.11, 0.8292)
      >>> print(estimate([one] * 10, None))
      10 requests to the judge, about 1,000 prompt tokens and 2,500 completion tokens
    """
    characters = sum(len(request.system) + len(request.prompt) for request in requests)
    sent = round(characters / _CHARACTERS_A_TOKEN)
    received = _JUDGMENT_TOKENS * len(requests)
    most = None if max_tokens is None else max_tokens * len(requests)
    if most is not None:
        received = min(received, most)
    cost = None if prices is None else price((sent, received), prices)
    max_cost = None if prices is None or most is None else price((sent, most), prices)
    return Estimate(len(requests), sent, received, most, cost, max_cost)
