"""The rating in a judge's words."""

import re

LOWEST, HIGHEST = 1.0, 10.0

_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]", re.ASCII)


def find_rating(judgment: str) -> float | None:
    """The rating that a judgment gives in the form it was asked for, "[[5]]".

    One rating may be given several times. Two different ones, one out of bounds, or one in another
    form are none: what the judge meant is not guessed. (FastChat takes the first of several.)

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
