"""Implements LoftQ: LoRA that starts by correcting the error of a quantized kernel."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.adapters.lora import LoRA, LoRAForm
from peft_jax.adapters.method import Arrays, ErrorFactors, GradientFactors
from peft_jax.adapters.peft_form import PeftForm
from peft_jax.adapters.singular import leading_triplets
from peft_jax.core.validation import check_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftQ(LoRA):
    """LoRA on a quantized kernel Q of W, y = x Q + s (x A) B, where s A B starts as W - Q.

    With the singular value decomposition W - Q = U S Vᵀ, A = U[:, :r] √(S / s) and
    B = √(S / s) V[:, :r]ᵀ, so that s A B is the best correction of rank r. The start needs the
    kernels before they were quantized: see `AdapterSpec.init`. Kernels that are not quantized start
    as in `LoRA`. Trainable arrays: `a`, `b`.

    Attributes:
      iterations: Number of power iterations of a randomized decomposition; 0 for an exact one,
        whose time grows with the cube of the kernel's width.

    Source: Li et al., 2023, arXiv 2310.08659, algorithm 1 with one step (T = 1), in which the
    kernel is quantized once. Further steps would quantize W - s A B in place of W, so that each
    adapter would need a base of its own. In Hugging Face PEFT, A B is the correction for any s.
    """

    name: ClassVar[str] = "loftq"
    no_decay: ClassVar[tuple[str, ...]] = ("a", "b")
    steps_at_start: ClassVar[bool] = True
    corrects_quantization: ClassVar[bool] = True

    iterations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations)

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the kernel has fewer than r singular directions."""
        if self.rank > min(shape):
            self.reject_rank(module, shape, most=min(shape))

    def error_factors(self, error: Float[Array, "d_in d_out"]) -> ErrorFactors:
        """Returns r triplets of the error."""
        u, s, vt = leading_triplets(error, self.rank, self.iterations)
        return ErrorFactors(u, s, vt.T)

    def init(
        self,
        key: jax.Array,
        shape: tuple[int, int],
        gradient: GradientFactors | None = None,
        *,
        error: ErrorFactors | None = None,
    ) -> tuple[Arrays, Arrays]:
        """Returns A and B from the error's singular triplets; those of LoRA without an error."""
        if error is None:
            return super().init(key, shape, gradient)
        roots = jnp.sqrt(error.s / self.scale)
        return {"a": error.u * roots, "b": roots[:, None] * error.v.T}, {}

    def peft_form(self) -> PeftForm | None:
        """Returns LoRA's form; none for a subclass, which may compute something else."""
        return LoRAForm(self) if type(self) is LoftQ else None

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns no form, because PEFT's adapters load as `lora`."""
        return ()
