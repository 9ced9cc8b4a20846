"""Converts an adapter of one kernel to Hugging Face PEFT's tensors, and back.

PEFT's layers multiply column vectors, so its matrices are transposed.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.butterfly import compose_butterfly
from kernels_pallas.cayley import cayley
from peft_jax.adapters import BOFT, LoRA, LoRAGA, TrainingMethod
from peft_jax.adapters.method import Arrays

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a module's tensors, by name suffix."""

LORA_NAMES = ("lora_A.weight", "lora_B.weight")
BOFT_NAMES = ("boft_R", "boft_s")

COMPOSED_TOLERANCE = 1e-5
"""Largest error of an entry after PEFT's Cayley transform of a composed rotation."""


class PeftForm(abc.ABC):
    """PEFT's form of one method's arrays for one kernel.

    Attributes:
      peft_type: PEFT's name of the method.
      names: Name suffixes of the tensors.
      exact: Whether `restore` inverts `export` bit for bit.
    """

    peft_type: str
    names: tuple[str, ...]
    exact: bool

    @abc.abstractmethod
    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns the shapes of the tensors of a kernel [d_in, d_out]."""

    @abc.abstractmethod
    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts the adapter's arrays, trainable and constant, to PEFT's tensors.

        Raises:
          NoPeftFormError: These values have no PEFT form.
        """

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Converts PEFT's tensors to the adapter's (trainable, constant) arrays."""
        raise NotImplementedError(f"{type(self).__name__} cannot be restored: it is not exact")


class NoPeftFormError(Exception):
    """Raised for an adapter without a PEFT form; the message says why."""


@dataclasses.dataclass(frozen=True)
class LoRAForm(PeftForm):
    """`lora_A.weight` is Aᵀ and `lora_B.weight` is Bᵀ."""

    method: LoRA
    peft_type = "LORA"
    names = LORA_NAMES
    exact = True

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [r, d_in] and [d_out, r]."""
        rank = self.method.rank
        return {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Transposes the factors."""
        return {"lora_A.weight": arrays["a"].T, "lora_B.weight": arrays["b"].T}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Transposes the tensors."""
        return {"a": tensors["lora_A.weight"].T, "b": tensors["lora_B.weight"].T}, {}


@dataclasses.dataclass(frozen=True)
class LoRAGAForm(PeftForm):
    """One LoRA of rank 2 r on the unchanged base: [A, A₀] and [B; -B₀]."""

    method: LoRAGA
    peft_type = "LORA"
    names = LORA_NAMES
    exact = True

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [2 r, d_in] and [d_out, 2 r]."""
        rank = 2 * self.method.rank
        return {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Concatenates the current and the initial factors."""
        return {
            "lora_A.weight": np.concatenate([arrays["a"], arrays["a0"]], axis=1).T,
            "lora_B.weight": np.concatenate([arrays["b"], -arrays["b0"]], axis=0).T,
        }

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Splits the tensors into current and initial factors."""
        a, a0 = np.split(tensors["lora_A.weight"].T, 2, axis=1)
        b, b0 = np.split(tensors["lora_B.weight"].T, 2, axis=0)
        return {"a": a, "b": b}, {"a0": a0, "b0": -b0}


@dataclasses.dataclass(frozen=True)
class BOFTForm(PeftForm):
    """`boft_R` [m, d_in / b, b, b] holds the full S, and `boft_s` [d_out, 1] the scale.

    PEFT without its CUDA extension supports m = 1 only.
    """

    method: BOFT
    peft_type = "BOFT"
    names = BOFT_NAMES
    exact = True

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [m, d_in / b, b, b] and [d_out, 1]."""
        b, m = self.method.block_size, self.method.n_butterfly_factors
        return {"boft_R": (m, d_in // b, b, b), "boft_s": (d_out, 1)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Builds the skew-symmetric blocks."""
        entries, b = arrays["r"], self.method.block_size
        blocks = np.zeros((*entries.shape[:-1], b, b), entries.dtype)
        rows, columns = np.triu_indices(b, k=1)
        blocks[..., rows, columns] = entries
        blocks[..., columns, rows] = -entries
        return {"boft_R": blocks, "boft_s": arrays["scale"][:, None]}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Extracts the entries above the diagonal of the blocks' skew-symmetric parts."""
        blocks = tensors["boft_R"]
        rows, columns = np.triu_indices(self.method.block_size, k=1)
        entries = (blocks[..., rows, columns] - blocks[..., columns, rows]) / 2
        return {"r": entries.astype(blocks.dtype), "scale": tensors["boft_s"][:, 0]}, {}


@dataclasses.dataclass(frozen=True)
class ComposedBOFTForm(PeftForm):
    """Several factors as one factor, their product M, with blocks of size b 2^(m-1).

    Its skew-symmetric blocks are R = (I + M)⁻¹ (I - M), the inverse Cayley transform.
    """

    method: BOFT
    peft_type = "BOFT"
    names = BOFT_NAMES
    exact = False

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [1, d_in / B, B, B] and [d_out, 1]."""
        size = self.method.composed_block_size
        return {"boft_R": (1, d_in // size, size, size), "boft_s": (d_out, 1)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the product's skew-symmetric blocks in float32.

        Raises:
          NoPeftFormError: The product rotates by nearly half a turn, which no Cayley
              transform does.
        """
        entries = jnp.asarray(arrays["r"], jnp.float32)
        product = np.asarray(_compose(entries, self.method.block_size), np.float64)
        if not np.isfinite(product).all():
            raise NoPeftFormError("its factors multiply to NaN or infinity")
        eye = np.eye(product.shape[-1])
        try:
            r = np.linalg.solve(eye + product, eye - product)
        except np.linalg.LinAlgError as error:
            raise NoPeftFormError(_HALF_TURN) from error
        skew = ((r - r.swapaxes(-1, -2)) / 2).astype(np.float32)
        # PEFT's Cayley transform of it, in PEFT's precision.
        again = np.linalg.solve((eye + skew).astype(np.float32), (eye - skew).astype(np.float32))
        if not np.abs(again - product).max() < COMPOSED_TOLERANCE:
            raise NoPeftFormError(_HALF_TURN)
        scale = np.asarray(arrays["scale"], np.float32)
        return {"boft_R": skew[None], "boft_s": scale[:, None]}


@functools.partial(jax.jit, static_argnums=1)
def _compose(r: jax.Array, block_size: int) -> jax.Array:
    """Returns the blocks of the factors' product from their free entries."""
    return compose_butterfly(cayley(r, block_size))


_HALF_TURN = (
    "its factors together turn something by nearly half a turn, which one factor, all that PEFT has"
    " without its CUDA extension, cannot"
)

_FORMS: dict[type[TrainingMethod], Callable[[Any], PeftForm]] = {
    LoRA: LoRAForm,
    LoRAGA: LoRAGAForm,
    BOFT: lambda method: (
        BOFTForm(method) if method.n_butterfly_factors == 1 else ComposedBOFTForm(method)
    ),
}


def peft_form(method: TrainingMethod) -> PeftForm | None:
    """Returns the PEFT form of a method's arrays; None if PEFT has no such method."""
    make = _FORMS.get(type(method))
    return make(method) if make else None


def nbytes(shapes: Shapes) -> int:
    """Returns the number of bytes of a module's tensors in float32."""
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def peft_rank_and_alpha(method: LoRA) -> tuple[int, float | int]:
    """Returns PEFT's `r` and `lora_alpha` for the method's scale.

    LoRA-GA has twice the rank in PEFT's form. So alpha is multiplied by 2, or by √2 if the scale is
    alpha / √r.

    Example:
      >>> peft_rank_and_alpha(LoRA(rank=4, alpha=8.0))
      (4, 8)
      >>> peft_rank_and_alpha(LoRAGA(rank=4, alpha=8.0, rank_stabilized=False))
      (8, 16)
    """
    rank, alpha = method.rank, float(method.alpha)
    if isinstance(method, LoRAGA):
        rank, alpha = 2 * rank, alpha * (math.sqrt(2) if method.rank_stabilized else 2)
    return rank, int(alpha) if alpha.is_integer() else alpha
