"""Extracts the rating from a judgment."""

import re

LOWEST, HIGHEST = 1.0, 10.0

_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]", re.ASCII)


def find_rating(judgment: str) -> float | None:
    """Returns the rating of a judgment, written as "[[5]]", or None.

    Repetitions of one rating are accepted. Different ratings, a rating out of bounds, or another
    notation give None, because the judge's intent would be a guess. FastChat takes the first of
    several ratings.

    Example:
      >>> find_rating("Clear and right. Rating: [[9]]"), find_rating("Rating: [[7.5]]")
      (9.0, 7.5)
      >>> [find_rating(said) for said in ("Rating: 9", "[[11]]", "[[0]]", "[[9/10]]")]
      [None, None, None, None]
      >>> find_rating("The first is worth [[3]], the second [[9]]") is None
      True
    """
    found = {float(number) for number in _RATING.findall(judgment)}
    if len(found) != 1:
        return None
    (rating,) = found
    return rating if LOWEST <= rating <= HIGHEST else None
