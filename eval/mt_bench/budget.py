"""What the judge has cost, kept below what it may."""

from .judges import Judgment
from .requests import JudgeRequest, estimate, price


class Budget:
    """Counts what requests cost, and lets none begin that might go over the budget.

    A request that is under way counts as if its answer were as long as it may be; one that is
    answered with what the endpoint says it took, or the same where it does not say.

    Args:
      most: what may be spent; None: no limit, and nothing is counted.
      prices: of a million tokens of prompts, and of answers.
      most_tokens: how many an answer may have.
    """

    def __init__(
        self,
        most: float | None,
        prices: tuple[float, float] | None,
        most_tokens: int | None,
    ):
        self._most = most
        self._prices = prices
        self._most_tokens = most_tokens
        self.spent = 0.0
        """What has been answered, and what is under way at its longest."""

    def may_begin(self, request: JudgeRequest) -> bool:
        """Whether there is enough left for a request, which counts from now on if so."""
        if self._most is None:
            return True
        cost = self._most_of(request)
        if self.spent + cost > self._most:
            return False
        self.spent += cost
        return True

    def answered(self, request: JudgeRequest, judgment: Judgment) -> None:
        """The request has been answered."""
        if self._most is not None and self._prices is not None and judgment.tokens is not None:
            self.spent += price(judgment.tokens, self._prices) - self._most_of(request)

    def not_answered(self, request: JudgeRequest) -> None:
        """The request has failed, which costs nothing."""
        if self._most is not None:
            self.spent -= self._most_of(request)

    def _most_of(self, request: JudgeRequest) -> float:
        return estimate([request], self._prices, self._most_tokens).most_cost or 0.0
