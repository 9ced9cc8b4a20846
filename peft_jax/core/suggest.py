"""Suggests near matches of an unknown name in error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Returns a phrase that suggests near matches of `name` and lists every known name.

    Args:
      name: Unknown name.
      known: Known names.
      limit: Maximum number of suggestions.

    Returns:
      "; did you mean 'rank'? Known: alpha, rank", or "; known: alpha, rank" without a near match.

    Example:
      >>> did_you_mean("rnak", ["rank", "alpha"])
      "; did you mean 'rank'? Known: alpha, rank"
      >>> did_you_mean("zzz", ["rank", "alpha"])
      '; known: alpha, rank'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    listing = ", ".join(names) if names else "nothing"
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}? Known: {listing}"
    return f"; known: {listing}"
