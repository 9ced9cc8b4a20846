"""Shapes of the unitary product, shared by tests and benchmarks."""

import dataclasses

import numpy as np

MODELS_BY_WIDTH = {
    4096: "Llama 7B, Llama 3 8B and BLOOM 7B1",
    5120: "Llama 13B",
    6656: "Llama 30B",
    8192: "Llama 70B",
    11008: "Llama 7B, feed-forward",
    13824: "Llama 13B, feed-forward",
    14336: "Llama 3 8B, feed-forward, and BLOOM 176B",
    16384: "Llama 405B, and BLOOM 7B1, feed-forward",
    17920: "Llama 30B, feed-forward",
    28672: "Llama 70B, feed-forward",
    53248: "Llama 405B, feed-forward",
    57344: "BLOOM 176B, feed-forward",
}
"""Input widths of linear maps, with the models that have them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Shape of one call.

    Attributes:
      batch: Axes before the features.
      n: Number of complex numbers in a row.
    """

    batch: tuple[int, ...]
    n: int

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns (x, g [*batch, 2 n], phases [3, n], reflections [2, 2, n]), float32.

        x and g are exact in bfloat16.
        """
        rng = np.random.default_rng(seed)

        def draw() -> np.ndarray:
            bits = rng.normal(size=(*self.batch, 2 * self.n)).astype(np.float32).view(np.uint32)
            return (bits & np.uint32(0xFFFF0000)).view(np.float32)

        x, g = draw(), draw()
        phases = rng.uniform(-3, 3, (3, self.n)).astype(np.float32)
        return x, g, phases, rng.normal(size=(2, 2, self.n)).astype(np.float32)


XLA_CASES = {
    "one": Case((3,), 1),
    "a prime": Case((2, 3), 7),
    "even": Case((5,), 12),
    "odd, in two batch axes": Case((2, 4), 45),
    "no batch": Case((), 30),
    "no rows": Case((2, 0), 6),
}
"""Shapes for XLA's form, which supports any n."""

KERNEL_CASES = {
    "one piece, no padding of rows": Case((8,), 128),
    "an odd number of pieces, ragged rows": Case((3, 7), 3 * 128),
    "pieces beyond one group of sublanes": Case((2, 16), 9 * 128),
    "one row": Case((), 2 * 128),
}
"""One shape for each code path of the kernels: n₁ from 1 on, and rows that do not fill a step."""
