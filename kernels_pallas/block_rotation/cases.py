"""Shapes of the block rotation for tests."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Shape of one call.

    Attributes:
      batch: Axes before the features.
      blocks: Number of blocks n.
      block_size: Block size B.
    """

    batch: tuple[int, ...]
    blocks: int
    block_size: int

    @property
    def features(self) -> int:
        """The width d = n B."""
        return self.blocks * self.block_size

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (x, g [*batch, d], blocks [n, B, B]) in float32, exact in bfloat16."""
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            bits = rng.normal(size=shape).astype(np.float32).view(np.uint32)
            return (bits & np.uint32(0xFFFF0000)).view(np.float32)

        x, g = draw(*self.batch, self.features), draw(*self.batch, self.features)
        return x, g, draw(self.blocks, self.block_size, self.block_size)


CASES = {
    "groups of small blocks": Case((3, 24), 16, 16),
    "blocks of a matrix": Case((40,), 3, 128),
    "a block of two matrices": Case((2, 16), 1, 256),
    "ragged tokens, each row its own": Case((2, 21), 2, 64),
    "features that end within a matrix": Case((20,), 5, 40),
    "blocks that straddle lanes": Case((17,), 8, 48),
    "one token": Case((), 4, 32),
}
"""One shape for each code path of the kernels."""
