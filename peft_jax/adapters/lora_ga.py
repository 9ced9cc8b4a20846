"""Implements LoRA-GA: LoRA initialized with the gradient's leading directions."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from peft_jax.adapters.lora_start import StartedForm, StartedLoRA
from peft_jax.adapters.method import Arrays, GradientFactors
from peft_jax.adapters.peft_form import PeftForm
from peft_jax.core.validation import check_choice, check_positive

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit")
CONVENTIONS = ("authors", "peft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAGA(StartedLoRA):
    """Low-rank adaptation with gradient approximation, y = x W + s ((x A) B - (x A₀) B₀).

    A and B are initialized to A₀ = c U[:, :r] and B₀ = c V[:, r:2r]ᵀ. U and V hold the singular
    vectors of the kernel's gradient G = U S Vᵀ on the first batches. Trainable and constant arrays
    as in `StartedLoRA`.

    Attributes:
      direction: Singular vectors of A and B. "ArB2r": A takes the first r, B the next r. "A2rBr":
        the reverse. "ArBr": B takes the even and A the odd ones of 2r. "random": both take the same
        random r of 2r.
      init_scale: Factor c. "stable": d_out^¼ / √gamma; "gd": 1 / s; "unit": 1.
      gamma: Constant of the "stable" factor.
      convention: "authors", as above, or "peft", as in Hugging Face PEFT. There only B is scaled by
        its singular values and the "stable" factor, which makes it nearly zero.

    Source: Wang, Yu and Li, 2024, arXiv 2407.05000, section 3, and its authors' code. With dropout,
    the subtracted product gets the same dropped inputs, so that the initial function stays exact.
    The authors' code subtracts from W once, so that it does not.
    """

    name: ClassVar[str] = "lora_ga"
    learning_rate: ClassVar[float] = 5e-5
    by_layer: ClassVar[bool] = True

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
        """Number of singular directions of the gradient that `init` needs: 2 r."""
        return 2 * self.rank

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the gradient has fewer than 2 r singular directions."""
        if 2 * self.rank > min(shape):
            self.reject_rank(module, shape, most=min(shape) // 2)

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns A and B from the gradient's singular vectors, and copies of both as constants.

        Raises:
          ValueError: `gradient` is None.
        """
        if gradient is None:
            raise ValueError(f"gradient must be given, because {self.name} is initialized from it")
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

    def neutral(self, shape: tuple[int, int]) -> tuple[Arrays, Arrays]:
        """Returns zeros."""
        zeros, _ = super().neutral(shape)
        return zeros, {"a0": zeros["a"], "b0": zeros["b"]}

    def _directions(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the columns of U for A and the columns of V for B."""
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

    def peft_form(self) -> PeftForm | None:
        """Returns PEFT's form; none for a subclass, which may compute something else."""
        return StartedForm(self) if type(self) is LoRAGA else None
