"""Computes the butterfly product in plain float64, with each factor as a d x d matrix.

The pairs of half-blocks follow the paper's text (BOFT, arXiv 2311.06243, section 4: at level i,
half-block h with half-block h + 2^i), not the implementations' reshapes.
"""

import numpy as np


def dense(factors: np.ndarray) -> np.ndarray:
    """Returns F_{m-1} ... F_0 as one matrix [d, d], float64, of factors [m, n, b, b]."""
    m, n, b, _ = factors.shape
    product = np.eye(n * b)
    for level in range(m):
        product = factor(factors[level], level if m > 1 else None) @ product
    return product


def factor(blocks: np.ndarray, level: int | None) -> np.ndarray:
    """Returns one factor as a matrix [d, d]; without a level, blocks act on features in order."""
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
    """Returns x F_{m-1} ... F_0 [..., d], float64."""
    return np.asarray(x, np.float64) @ dense(factors)


def backward(x: np.ndarray, g: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (dx [..., d], dfactors [m, n, b, b]), float64, for the gradient g [..., d]."""
    shape = x.shape
    x, g = (np.asarray(a, np.float64).reshape(-1, shape[-1]) for a in (x, g))
    levels = [None] if len(factors) == 1 else range(len(factors))
    matrices = [factor(f, level) for f, level in zip(factors, levels, strict=True)]
    inputs = [x]
    for matrix in reversed(matrices):
        inputs.append(inputs[-1] @ matrix)
    dfactors = np.zeros(factors.shape)
    for level, matrix in enumerate(matrices):
        whole = inputs[len(matrices) - 1 - level].T @ g
        # Numbering the entries of the blocks finds their places in the matrix.
        index = np.arange(1, factors[level].size + 1, dtype=np.float64)
        places = factor(index.reshape(factors[level].shape), levels[level])
        at = np.nonzero(places)
        dfactors[level].reshape(-1)[places[at].astype(int) - 1] = whole[at]
        g = g @ matrix.T
    return g.reshape(shape), dfactors
