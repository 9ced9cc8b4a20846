"""Limits the cost of the judge."""

from .judges import Judgment
from .requests import JudgeRequest, estimate, price


class Budget:
    """Adds up the cost of requests, and rejects one that might exceed the limit.

    A running request counts with its maximum cost. A finished one counts with the tokens that the
    endpoint reports, or with its maximum cost if there is no report.

    Args:
      limit: Maximum cost; None: no limit, and costs are not added up.
      prices: Prices per million prompt tokens and per million completion tokens.
      max_tokens: Maximum tokens of a judgment.
    """

    def __init__(
        self,
        limit: float | None,
        prices: tuple[float, float] | None,
        max_tokens: int | None,
    ):
        self._limit = limit
        self._prices = prices
        self._max_tokens = max_tokens
        self.spent = 0.0
        """Cost of finished requests, plus the maximum cost of running ones."""

    def may_begin(self, request: JudgeRequest) -> bool:
        """Returns whether the budget allows a request; if so, its maximum cost is reserved."""
        if self._limit is None:
            return True
        cost = self._max_cost_of(request)
        if self.spent + cost > self._limit:
            return False
        self.spent += cost
        return True

    def answered(self, request: JudgeRequest, judgment: Judgment) -> None:
        """Replaces a request's maximum cost by the reported one."""
        if self._limit is not None and self._prices is not None and judgment.tokens is not None:
            self.spent += price(judgment.tokens, self._prices) - self._max_cost_of(request)

    def not_answered(self, request: JudgeRequest) -> None:
        """Releases the cost of a failed request, which costs nothing."""
        if self._limit is not None:
            self.spent -= self._max_cost_of(request)

    def _max_cost_of(self, request: JudgeRequest) -> float:
        return estimate([request], self._prices, self._max_tokens).max_cost or 0.0
