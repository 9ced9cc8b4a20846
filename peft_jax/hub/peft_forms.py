"""An adapter over one kernel as Hugging Face PEFT's tensors, and back.

PEFT's layers multiply column vectors, so its matrices are the transposes of those here.
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
"""Shapes of a module's tensors by the end of their names."""

LORA_NAMES = ("lora_A.weight", "lora_B.weight")
BOFT_NAMES = ("boft_R", "boft_s")

COMPOSED_TOLERANCE = 1e-5
"""How far entries of a composed rotation may come out of PEFT's Cayley transform from it."""


class PeftForm(abc.ABC):
    """How one method's arrays over one kernel are written for PEFT.

    Attributes:
      peft_type: PEFT's name of the method.
      names: the ends of the tensors' names.
      exact: whether `restore` gives back what `export` was given, bit for bit.
    """

    peft_type: str
    names: tuple[str, ...]
    exact: bool

    @abc.abstractmethod
    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """The shapes of the tensors of a kernel [d_in, d_out]."""

    @abc.abstractmethod
    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """PEFT's tensors from the adapter's arrays, trained and constant ones.

        Raises:
          NoPeftFormError: these values have no such form.
        """

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """The adapter's arrays (trained, constant) from PEFT's tensors."""
        raise NotImplementedError(f"{type(self).__name__} cannot be taken back")


class NoPeftFormError(Exception):
    """An adapter that PEFT has no form of; the message says why."""


@dataclasses.dataclass(frozen=True)
class LoRAForm(PeftForm):
    """`lora_A.weight` is Aᵀ and `lora_B.weight` is Bᵀ."""

    method: LoRA
    peft_type = "LORA"
    names = LORA_NAMES
    exact = True

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """[r, d_in] and [d_out, r]."""
        rank = self.method.rank
        return {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The transposes."""
        return {"lora_A.weight": arrays["a"].T, "lora_B.weight": arrays["b"].T}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """The transposes."""
        return {"a": tensors["lora_A.weight"].T, "b": tensors["lora_B.weight"].T}, {}


@dataclasses.dataclass(frozen=True)
class LoRAGAForm(PeftForm):
    """One LoRA of rank 2 r on the base as it is: [A, A₀] and [B; -B₀]."""

    method: LoRAGA
    peft_type = "LORA"
    names = LORA_NAMES
    exact = True

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """[2 r, d_in] and [d_out, 2 r]."""
        rank = 2 * self.method.rank
        return {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Both products in one."""
        return {
            "lora_A.weight": np.concatenate([arrays["a"], arrays["a0"]], axis=1).T,
            "lora_B.weight": np.concatenate([arrays["b"], -arrays["b0"]], axis=0).T,
        }

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """The halves apart."""
        a, a0 = np.split(tensors["lora_A.weight"].T, 2, axis=1)
        b, b0 = np.split(tensors["lora_B.weight"].T, 2, axis=0)
        return {"a": a, "b": b}, {"a0": a0, "b0": -b0}


@dataclasses.dataclass(frozen=True)
class BOFTForm(PeftForm):
    """`boft_R` [m, d_in / b, b, b] is S whole, and `boft_s` [d_out, 1] the scale.

    PEFT without its CUDA extension takes m = 1 only.
    """

    method: BOFT
    peft_type = "BOFT"
    names = BOFT_NAMES
    exact = True

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """[m, d_in / b, b, b] and [d_out, 1]."""
        b, m = self.method.block_size, self.method.n_butterfly_factors
        return {"boft_R": (m, d_in // b, b, b), "boft_s": (d_out, 1)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The skew-symmetric blocks."""
        entries, b = arrays["r"], self.method.block_size
        blocks = np.zeros((*entries.shape[:-1], b, b), entries.dtype)
        rows, columns = np.triu_indices(b, k=1)
        blocks[..., rows, columns] = entries
        blocks[..., columns, rows] = -entries
        return {"boft_R": blocks, "boft_s": arrays["scale"][:, None]}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """The entries above the diagonal of the blocks' skew-symmetric parts."""
        blocks = tensors["boft_R"]
        rows, columns = np.triu_indices(self.method.block_size, k=1)
        entries = (blocks[..., rows, columns] - blocks[..., columns, rows]) / 2
        return {"r": entries.astype(blocks.dtype), "scale": tensors["boft_s"][:, 0]}, {}


@dataclasses.dataclass(frozen=True)
class ComposedBOFTForm(PeftForm):
    """Several factors as the one factor that is their product M, with blocks of b 2^(m-1).

    Its skew-symmetric blocks are R = (I + M)⁻¹ (I - M), the Cayley transform's inverse.
    """

    method: BOFT
    peft_type = "BOFT"
    names = BOFT_NAMES
    exact = False

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """[1, d_in / B, B, B] and [d_out, 1]."""
        size = self.method.composed_block_size
        return {"boft_R": (1, d_in // size, size, size), "boft_s": (d_out, 1)}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The product's skew-symmetric blocks, float32.

        Raises:
          NoPeftFormError: the product turns something by half a turn, or nearly: no Cayley
            transform does that.
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
        # What PEFT makes of it, in the precision PEFT makes it in.
        again = np.linalg.solve((eye + skew).astype(np.float32), (eye - skew).astype(np.float32))
        if not np.abs(again - product).max() < COMPOSED_TOLERANCE:
            raise NoPeftFormError(_HALF_TURN)
        scale = np.asarray(arrays["scale"], np.float32)
        return {"boft_R": skew[None], "boft_s": scale[:, None]}


@functools.partial(jax.jit, static_argnums=1)
def _compose(r: jax.Array, block_size: int) -> jax.Array:
    """The blocks of the factors' product from their free entries."""
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
    """How a method's arrays are written for PEFT; None where PEFT has no such method."""
    make = _FORMS.get(type(method))
    return make(method) if make else None


def nbytes(shapes: Shapes) -> int:
    """Bytes of a module's tensors in float32."""
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def peft_rank_and_alpha(method: LoRA) -> tuple[int, float | int]:
    """PEFT's `r` and `lora_alpha` that give the method's scale.

    LoRA-GA is of twice the rank in PEFT's form, so alpha is larger by 2, or by √2 where the scale
    is alpha / √r.

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
