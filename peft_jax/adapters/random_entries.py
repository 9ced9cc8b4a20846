"""Draws random entries of a matrix, as Hugging Face PEFT does on torch."""

import functools

import numpy as np
from jaxtyping import Int


@functools.lru_cache(maxsize=256)
def entries(
    seed: int, rows: int, columns: int, count: int
) -> tuple[Int[np.ndarray, " count"], Int[np.ndarray, " count"]]:
    """Returns the rows and columns of random entries of a matrix, without repetition.

    They are the first entries of the random permutation that torch draws on a CPU from the seed:
    a shuffle of Fisher and Yates by the remainders of the words of a Mersenne twister. Only the
    entries that have moved are held.

    Args:
      seed: Seed.
      rows: Number of rows of the matrix.
      columns: Number of columns.
      count: Number of entries.

    Example:
      >>> entries(777, 2, 3, 6)
      (array([1, 0, 0, 0, 1, 1]), array([2, 0, 1, 2, 0, 1]))
    """
    size = rows * columns
    words = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=count, dtype=np.uint32)
    moved: dict[int, int] = {}
    chosen = np.empty(count, np.int64)
    for place, word in enumerate(words.tolist()):
        other = place + word % (size - place)
        chosen[place] = moved.get(other, other)
        moved[other] = moved.get(place, place)
    return chosen // columns, chosen % columns
