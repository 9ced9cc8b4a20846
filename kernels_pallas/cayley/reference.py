"""The Cayley transform in plain float64 with a library's inverse, as a reference for tests."""

import numpy as np


def skew_symmetric(entries: np.ndarray, size: int) -> np.ndarray:
    """Returns S [..., b, b] of its entries [..., b (b-1) / 2] above the diagonal, row by row."""
    s = np.zeros((*entries.shape[:-1], size, size))
    place = 0
    for row in range(size):
        for column in range(row + 1, size):
            s[..., row, column] = entries[..., place]
            s[..., column, row] = -entries[..., place].astype(np.float64)
            place += 1
    return s


def cayley(entries: np.ndarray, size: int) -> np.ndarray:
    """Returns Q = (I - S)(I + S)⁻¹, [..., b, b]."""
    s = skew_symmetric(entries, size)
    return (np.eye(size) - s) @ np.linalg.inv(np.eye(size) + s)
