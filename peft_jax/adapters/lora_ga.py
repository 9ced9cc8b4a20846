"""LoRA-GA: a low-rank adapter that starts along the gradient's leading directions."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.method import Arrays, Axes, GradientFactors
from peft_jax.core.validation import check_choice, check_positive

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit")
CONVENTIONS = ("authors", "peft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAGA(LoRA):
    """Low-rank adaptation with gradient approximation, y = x W + s ((x A) B - (x A₀) B₀).

    A and B start at A₀ and B₀, taken from the singular vectors of the kernel's gradient
    G = U S Vᵀ on the first batches: A₀ = c U[:, :r], B₀ = c V[:, r:2r]ᵀ. Subtracting their product
    leaves the function as it was, and works over any kind of base kernel. Trained: `a`, `b`;
    constant: `a0`, `b0`.

    Attributes:
      direction: which singular vectors A and B take. "ArB2r": A the first r, B the next r;
        "A2rBr": the other way round; "ArBr": alternating, B the even and A the odd ones; "random":
        the same r of the 2r at random for both.
      init_scale: The scale c. "stable": d_out^¼ / √gamma; "gd": 1 / s; "unit": 1.
      gamma: The constant of the "stable" scale.
      convention: "authors", as above; "peft": as Hugging Face PEFT starts, where B alone carries
        its singular values and the "stable" factor, which makes it nearly zero.

    Source: Wang, Yu and Li, 2024, arXiv 2407.05000, section 3, and its authors' code. With dropout
    the same dropped inputs feed the subtracted product, so that the start stays exact; in the
    authors' code, which subtracts from W once, it is not.
    """

    name: ClassVar[str] = "lora_ga"
    learning_rate: ClassVar[float] = 5e-5

    rank_stabilized: bool = True
    direction: str = "ArB2r"
    init_scale: str = "stable"
    gamma: float = 16.0
    convention: str = "authors"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("direction", self.direction, DIRECTIONS)
        check_choice("init_scale", self.init_scale, SCALES)
        check_choice("convention", self.convention, CONVENTIONS)
        check_positive("gamma", self.gamma)

    @property
    def gradient_rank(self) -> int:
        """2 r singular directions."""
        return 2 * self.rank

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """A gradient has no more than min(d_in, d_out) directions, and 2 r are needed."""
        if 2 * self.rank > min(shape):
            raise ValueError(
                f"{self.name} with rank {self.rank} takes {2 * self.rank} singular directions of a"
                f" gradient, but the kernel of {module} [{shape[0]}, {shape[1]}] has only"
                f" {min(shape)}; use a rank of at most {min(shape) // 2} there (rank_pattern), or"
                " exclude it"
            )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """A and B from the gradient's singular vectors; copies of both as constants.

        Raises:
          ValueError: without the gradient's factors.
        """
        if gradient is None:
            raise ValueError(f"{self.name} starts from the kernel's gradient, which was not given")
        for_a, for_b = self._directions(key)
        a = gradient.u[:, for_a]
        b = gradient.v[:, for_b].T
        c = {
            "stable": shape[1] ** 0.25 / math.sqrt(self.gamma),
            "gd": 1.0 / self.scale,
            "unit": 1.0,
        }[self.init_scale]
        if self.convention == "peft":
            b = b * gradient.s[for_b][:, None]
            a = a if self.init_scale == "stable" else c * a
            b = c * b
        else:
            a, b = c * a, c * b
        return {"a": a, "b": b}, {"a0": a, "b0": b}

    def _directions(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The columns of U that A takes, and of V that B takes."""
        r = self.rank
        first, second = jnp.arange(r), jnp.arange(r, 2 * r)
        if self.direction == "ArB2r":
            return first, second
        if self.direction == "A2rBr":
            return second, first
        if self.direction == "ArBr":
            return jnp.arange(1, 2 * r, 2), jnp.arange(0, 2 * r, 2)
        chosen = jax.random.permutation(key, 2 * r)[:r]
        return chosen, chosen

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """The constants are laid out as what they are copies of."""
        trainable, _ = super().axes(d_in, d_out)
        return trainable, {"a0": trainable["a"], "b0": trainable["b"]}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """[A, A₀] and s [B; -B₀]: one product of rank 2 r."""
        del dropout_key
        return {
            "a": jnp.concatenate([trainable["a"], constant["a0"]], axis=1),
            "b": self.scale * jnp.concatenate([trainable["b"], -constant["b0"]], axis=0),
        }
