"""What the judge is asked, and what it will cost."""

import dataclasses
from collections.abc import Sequence

from .files import Benchmark, Question

_CHARACTERS_A_TOKEN = 3.5
"""Fewer than English has on average with the tokenizers of today, so that estimates are not low."""

_JUDGMENT_TOKENS = 250
"""What a judgment takes on average: a short explanation and the rating."""


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge: to rate one turn's answer.

    Attributes:
      question: which question.
      category: its category.
      turn: which turn, from 1.
      system: what the system says.
      prompt: what the user says.
    """

    question: int
    category: str
    turn: int
    system: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What requests will cost.

    Attributes:
      requests: how many.
      prompt_tokens: about how many tokens are sent.
      answer_tokens: about how many come back.
      most_answer_tokens: how many may come back; None where answers have no limit.
      cost: in the currency of the prices; None where there are none.
      most_cost: the same if every answer is as long as it may be; None where there is no limit.
    """

    requests: int
    prompt_tokens: int
    answer_tokens: int
    most_answer_tokens: int | None
    cost: float | None
    most_cost: float | None

    def __str__(self) -> str:
        most = "" if self.most_answer_tokens is None else f" (at most {self.most_answer_tokens:,})"
        cost = "" if self.cost is None else f", about {self.cost:.2f} by the prices given"
        cost += "" if self.most_cost is None else f" (at most {self.most_cost:.2f})"
        return (
            f"{self.requests} requests to the judge, about {self.prompt_tokens:,} tokens of prompts"
            f" and {self.answer_tokens:,}{most} of answers{cost}"
        )


def judge_requests(
    benchmark: Benchmark, question: Question, answers: Sequence[str]
) -> list[JudgeRequest]:
    """Both turns' requests for one question, in FastChat's words.

    Args:
      benchmark: the judge's prompts.
      question: the question.
      answers: what the model said in each turn.
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
    """What tokens of prompts and of answers cost, by the prices of a million of each."""
    return (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6


def estimate(
    requests: Sequence[JudgeRequest],
    prices: tuple[float, float] | None,
    most_tokens: int | None = None,
) -> Estimate:
    """What requests will cost.

    Args:
      requests: those to be made.
      prices: of a million tokens of prompts, and of answers; None where they are not known.
      most_tokens: how many an answer may have; None where there is no limit.

    Example:
      >>> one = JudgeRequest(81, "writing", 1, "s" * 35, "p" * 315)
      >>> found = estimate([one] * 10, (10.0, 40.0), most_tokens=2048)
      >>> found.cost, round(found.most_cost, 4)
      (0.11, 0.8292)
      >>> print(estimate([one] * 10, None))
      10 requests to the judge, about 1,000 tokens of prompts and 2,500 of answers
    """
    characters = sum(len(request.system) + len(request.prompt) for request in requests)
    sent = round(characters / _CHARACTERS_A_TOKEN)
    received = _JUDGMENT_TOKENS * len(requests)
    most = None if most_tokens is None else most_tokens * len(requests)
    if most is not None:
        received = min(received, most)
    cost = None if prices is None else price((sent, received), prices)
    most_cost = None if prices is None or most is None else price((sent, most), prices)
    return Estimate(len(requests), sent, received, most, cost, most_cost)
