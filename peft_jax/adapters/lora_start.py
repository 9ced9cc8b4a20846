"""Implements LoRA with a start that is subtracted, and the starts from the kernel: PiSSA, OLoRA."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.lora import LORA_SETTINGS, LoRA, LoRAForm, lora_settings
from peft_jax.adapters.method import Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_form import PeftForm, Shapes, plain_number
from peft_jax.adapters.singular import leading_triplets
from peft_jax.core.validation import check_count

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartedLoRA(LoRA):
    """LoRA from a start that is not zero, y = x W + s ((x A) B - (x A₀) B₀).

    Subtracting A₀ B₀ keeps the initial function unchanged, for any kind of base kernel. Trainable
    arrays: `a`, `b`. Constant arrays: `a0`, `b0`.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("a", "b")

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard the constant copies as the trainable arrays."""
        trainable, _ = super().axes(d_in, d_out)
        return trainable, {"a0": trainable["a"], "b0": trainable["b"]}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns [A - A₀, A₀] and s [B; B - B₀], whose product has rank 2 r.

        It equals s (A B - A₀ B₀), but large starts do not cancel in the dtype of activations.
        """
        del dropout_key
        a0, b0 = constant["a0"], constant["b0"]
        return {
            "a": jnp.concatenate([trainable["a"] - a0, a0], axis=1),
            "b": self.scale * jnp.concatenate([trainable["b"], trainable["b"] - b0], axis=0),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FromKernel(StartedLoRA, abc.ABC):
    """LoRA with a start that follows from the kernel, and never from a random key."""

    uses_kernel: ClassVar[bool] = True

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the kernel has fewer than r singular directions."""
        if self.rank > min(shape):
            self.reject_rank(module, shape, most=min(shape))

    def init(
        self,
        key: jax.Array,
        shape: tuple[int, int],
        gradient: GradientFactors | None = None,
        *,
        kernel: Float[Array, "d_in d_out"] | None = None,
    ) -> tuple[Arrays, Arrays]:
        """Returns A₀ and B₀, trainable and constant.

        Raises:
          ValueError: `kernel` is None.
        """
        del key, shape, gradient
        if kernel is None:
            raise ValueError(f"kernel must be given, because {self.name} is initialized from it")
        constant = self.kernel_constants(kernel)
        return {"a": constant["a0"], "b": constant["b0"]}, constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(_FromKernel):
    """Low-rank adaptation of the principal singular directions, y = x W + s ((x A) B - (x A₀) B₀).

    With W = U S Vᵀ, A₀ = U[:, :r] √(S / s) and B₀ = √(S / s) V[:, :r]ᵀ, so that s A₀ B₀ is the best
    approximation of W with rank r, which the factors then train. Trainable and constant arrays as
    in `StartedLoRA`.

    Attributes:
      iterations: Number of power iterations of a randomized decomposition; 0 for an exact one,
        whose time grows with the cube of the kernel's width.

    Source: Meng, Wang and Zhang, 2024, arXiv 2404.02948, eq. 2 to 4. The paper subtracts s A₀ B₀
    from W once. Here the base stays as it is, so that it may be quantized before.
    """

    name: ClassVar[str] = "pissa"
    learning_rate: ClassVar[float] = 2e-5

    alpha: float = 8.0
    iterations: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations)

    def kernel_constants(self, kernel: Float[Array, "d_in d_out"]) -> Arrays:
        """Returns A₀ and B₀."""
        u, s, vt = leading_triplets(kernel, self.rank, self.iterations)
        root = jnp.sqrt(s / self.scale)
        return {"a0": u * root, "b0": root[:, None] * vt}

    def peft_form(self) -> PeftForm | None:
        """Returns PEFT's form; none for a subclass, which may compute something else."""
        return StartedForm(self) if type(self) is PiSSA else None

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of factors on a base from which the start was subtracted."""
        return (PiSSAForm,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OLoRA(_FromKernel):
    """Low-rank adaptation from an orthonormal basis, y = x W + s ((x A) B - (x A₀) B₀).

    With Wᵀ = Q R, B₀ holds the first r columns of Q, as rows, and A₀ the first r rows of R, as
    columns. The first r columns of Q follow from the first r rows of W alone, and A₀ = W B₀ᵀ.
    Trainable and constant arrays as in `StartedLoRA`.

    Source: Büyükakyüz, 2024, arXiv 2406.01775, algorithm 1, for torch's weights Wᵀ. The paper
    subtracts s A₀ B₀ from W once. Here the base stays as it is.
    """

    name: ClassVar[str] = "olora"
    learning_rate: ClassVar[float] = 3e-4

    def kernel_constants(self, kernel: Float[Array, "d_in d_out"]) -> Arrays:
        """Returns A₀ and B₀."""
        q, _ = jnp.linalg.qr(kernel[: self.rank].T)
        return {"a0": jnp.matmul(kernel, q, precision=HIGHEST), "b0": q.T}

    def peft_form(self) -> PeftForm | None:
        """Returns PEFT's form; none for a subclass, which may compute something else."""
        return StartedForm(self) if type(self) is OLoRA else None

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of factors on a base from which the start was subtracted."""
        return (OLoRAForm,)


@dataclasses.dataclass(frozen=True)
class StartedForm(LoRAForm):
    """One LoRA of rank 2 r on the unchanged base: [A, A₀] and [B; -B₀]."""

    method: StartedLoRA

    def settings(self) -> dict[str, Any]:
        """Returns LoRA's settings for twice the rank.

        Alpha is larger by 2, or by √2 where the scale is alpha / √r.

        Example:
          >>> StartedForm(OLoRA(rank=4, alpha=8.0)).settings()["lora_alpha"]
          16
        """
        factor = math.sqrt(2) if self.method.rank_stabilized else 2
        alpha = plain_number(self.method.alpha * factor)
        return super().settings() | {"r": 2 * self.method.rank, "lora_alpha": alpha}

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [2 r, d_in] and [d_out, 2 r]."""
        rank = 2 * self.method.rank
        return {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Concatenates the current and the initial factors."""
        r = self.method.rank
        a, b, a0, b0 = (arrays[name] for name in ("a", "b", "a0", "b0"))
        return {
            "lora_A.weight": np.concatenate([a[:, :r], a0[:, :r]], axis=1).T,
            "lora_B.weight": np.concatenate([b[:r], -b0[:r]], axis=0).T,
        }

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Splits the tensors into current and initial factors."""
        a, a0 = np.split(tensors["lora_A.weight"].T, 2, axis=1)
        b, b0 = np.split(tensors["lora_B.weight"].T, 2, axis=0)
        return {"a": a, "b": b}, {"a0": a0, "b0": -b0}


class _UnconvertedForm(LoRAForm, abc.ABC):
    """Factors on a base from which the start was subtracted, as PEFT saves them by default.

    PEFT computes the start again from the base when it loads such an adapter, and so does
    `AdapterMethod.kernel_constants`. It is read only.
    """

    exact = False


@dataclasses.dataclass(frozen=True)
class PiSSAForm(_UnconvertedForm):
    """PiSSA with an exact decomposition, not converted to the unchanged base."""

    marks: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "pissa"}
    understood = dataclasses.replace(
        LORA_SETTINGS, fixed={**LORA_SETTINGS.fixed, "init_lora_weights": ("pissa",)}
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> PiSSA:
        """Returns PiSSA with the rank, alpha and dropout of the configuration."""
        del modules
        return PiSSA(**lora_settings(config))


@dataclasses.dataclass(frozen=True)
class OLoRAForm(_UnconvertedForm):
    """OLoRA, not converted to the unchanged base."""

    marks: ClassVar[Mapping[str, Any]] = {"init_lora_weights": "olora"}
    understood = dataclasses.replace(
        LORA_SETTINGS, fixed={**LORA_SETTINGS.fixed, "init_lora_weights": ("olora",)}
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> OLoRA:
        """Returns OLoRA with the rank, alpha and dropout of the configuration."""
        del modules
        return OLoRA(**lora_settings(config))
