"""The product written a second time, in float64: each factor as a d x d matrix, half by half.

Which halves a factor's blocks pair is taken from the paper's words (BOFT, arXiv 2311.06243, section
4: at level i, half-block h with half-block h + 2^i), not from the implementations' reshapes.
"""

import numpy as np


def dense(factors: np.ndarray) -> np.ndarray:
    """F_{m-1} ... F_0 as one matrix [d, d], float64, of factors [m, n, b, b]."""
    m, n, b, _ = factors.shape
    product = np.eye(n * b)
    for level in range(m):
        product = factor(factors[level], level if m > 1 else None) @ product
    return product


def factor(blocks: np.ndarray, level: int | None) -> np.ndarray:
    """One factor as a matrix [d, d]; without a level its blocks are whole blocks in order."""
    n, b, _ = blocks.shape
    matrix = np.zeros((n * b, n * b))
    if level is None:
        pairs = [(2 * index, 2 * index + 1) for index in range(n)]
        half = b / 2
    else:
        stride = 2**level
        firsts = [h for h in range(2 * n) if (h // stride) % 2 == 0]
        pairs = [(h, h + stride) for h in firsts]
        half = b // 2
    for block, (first, second) in zip(np.asarray(blocks, np.float64), pairs, strict=True):
        if level is None:
            features = np.arange(int(first * half), int((second + 1) * half))
        else:
            features = np.concatenate(
                [
                    np.arange(first * half, (first + 1) * half),
                    np.arange(second * half, (second + 1) * half),
                ]
            )
        matrix[np.ix_(features, features)] = block
    return matrix


def forward(x: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The product x F_{m-1} ... F_0 [..., d], float64."""
    return np.asarray(x, np.float64) @ dense(factors)
