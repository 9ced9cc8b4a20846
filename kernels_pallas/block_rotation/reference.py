"""Rotates blocks in plain float64, as a reference for tests.

It shares no code with the implementations: it builds the dense block-diagonal matrix.
"""

import numpy as np


def dense(blocks: np.ndarray) -> np.ndarray:
    """Returns the block-diagonal matrix [d, d], float64, of blocks [n, B, B]."""
    n, size, _ = blocks.shape
    matrix = np.zeros((n * size, n * size))
    for index, block in enumerate(blocks):
        at = slice(index * size, (index + 1) * size)
        matrix[at, at] = np.asarray(block, np.float64)
    return matrix


def forward(x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Returns y = x blockdiag(blocks) [..., d], float64."""
    return np.asarray(x, np.float64) @ dense(blocks)


def backward(x: np.ndarray, g: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (dx [..., d], dblocks [n, B, B]), float64, for the gradient g of y."""
    n, size, _ = blocks.shape
    g64 = np.asarray(g, np.float64)
    dx = g64 @ dense(blocks).T
    rows, gradients = np.asarray(x, np.float64).reshape(-1, n * size), g64.reshape(-1, n * size)
    dblocks = np.zeros((n, size, size))
    for index in range(n):
        at = slice(index * size, (index + 1) * size)
        for row, gradient in zip(rows, gradients, strict=True):
            dblocks[index] += np.outer(row[at], gradient[at])
    return dx, dblocks
