"""Near matches for a name that is not known, for error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A phrase that names what was probably meant, and everything that would work.

    Args:
      name: what was given.
      known: what would have worked.
      limit: how many near matches to name at most.

    Returns:
      "; did you mean 'rank'? Known: alpha, rank" or, with nothing near, "; known: alpha, rank".

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
