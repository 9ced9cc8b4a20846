"""Shapes of the butterfly for tests."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Shape of one call.

    Attributes:
      batch: Axes before the features.
      block_size: Block size b.
      factors: Number of factors m.
      groups: Number of groups of features that do not mix; d = groups b 2^(m-1).
    """

    batch: tuple[int, ...]
    block_size: int
    factors: int
    groups: int = 1

    @property
    def blocks(self) -> int:
        """The number of blocks n of one factor."""
        return self.groups * 2 ** (self.factors - 1)

    @property
    def features(self) -> int:
        """The width d = n b."""
        return self.blocks * self.block_size

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (x, g [*batch, d], factors [m, n, b, b]), float32; factors about keep norms."""
        rng = np.random.default_rng(seed)
        x, g = rng.normal(size=(2, *self.batch, self.features)).astype(np.float32)
        b = self.block_size
        factors = rng.normal(size=(self.factors, self.blocks, b, b)) / np.sqrt(b)
        return x, g, factors.astype(np.float32)


CASES = {
    "one high level": Case((20,), 64, 3),
    "three high levels, two groups": Case((2, 21), 32, 6, groups=2),
    "large blocks": Case((16,), 128, 3),
    "small blocks": Case((24,), 4, 8),
    "blocks of no power of two": Case((18,), 96, 4),
    "composed": Case((3, 5), 8, 3, groups=2),
    "one factor": Case((7,), 8, 1, groups=3),
}
"""One shape for each code path of the kernels."""
