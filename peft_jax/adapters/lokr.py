"""Implements LoKr: a Kronecker product that is added to the kernel."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.adapters.method import (
    AdapterMethod,
    Arrays,
    Axes,
    GradientFactors,
    drop_inputs,
)
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import (
    NEUTRAL,
    PeftForm,
    PeftSettings,
    Shapes,
)
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_fraction, check_positive, check_positive_int

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(AdapterMethod):
    """Kronecker product, y = x W + s x (C ⊗ A B) with s = alpha / rank.

    d_in = p q and d_out = k m are split into factors near their square roots: C is [p, k], A is
    [q, r] and B is [r, m]. An input is read as a matrix X [p, q], and x (C ⊗ A B) as Cᵀ X (A B), so
    that no array of the kernel's size is formed. Trainable arrays: `c`, initially zero, and `a`,
    `b`, initially uniform within ±1/√r and ±1/√q.

    Attributes:
      rank: Rank r of the second factor. It must be below half of q or of m, whichever is larger;
        from there on Hugging Face PEFT stores A B as one matrix.
      alpha: Numerator of s.
      decompose_factor: The first factors p and k, if they divide d_in and d_out; otherwise their
        largest value. -1 for the square root.
      dropout: Probability that an input of the second term is dropped while training. PEFT drops
        outputs or whole modules instead.

    Source: Yeh et al., 2023, arXiv 2309.14859 (LyCORIS), section 3.3, with a full first factor.
    """

    name: ClassVar[str] = "lokr"
    learning_rate: ClassVar[float] = 2e-4

    rank: int = 8
    alpha: float = 16.0
    decompose_factor: int = -1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_fraction("dropout", self.dropout)
        if self.decompose_factor != -1:
            check_positive_int("decompose_factor", self.decompose_factor)

    @property
    def scale(self) -> float:
        """Factor s on the Kronecker product."""
        return self.alpha / self.rank

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the rank is not below half of the second factor's size."""
        (p, q), (k, m) = (split_size(size, self.decompose_factor) for size in shape)
        if 2 * self.rank >= max(q, m):
            raise ValueError(
                f"rank is {self.rank}, but {self.name} on {module} [{p} x {q}, {k} x {m}] needs a"
                f" rank below {max(q, m) / 2:g}; set it with rank_pattern"
            )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns a zero first factor and a random second one."""
        del gradient
        (p, q), (k, m) = (split_size(size, self.decompose_factor) for size in shape)
        a_key, b_key = jax.random.split(key)
        of_a, of_b = 1.0 / math.sqrt(q), 1.0 / math.sqrt(self.rank)
        return {
            "c": jnp.zeros((p, k), jnp.float32),
            "a": jax.random.uniform(a_key, (q, self.rank), jnp.float32, -of_a, of_a),
            "b": jax.random.uniform(b_key, (self.rank, m), jnp.float32, -of_b, of_b),
        }, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns unsharded axes: the factors have about √d_in and √d_out features."""
        del d_in, d_out
        return {"c": (None, None), "a": (None, None), "b": (None, None)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns s C and A B, which is about √d_in by √d_out."""
        del constant, dropout_key
        second = jnp.matmul(trainable["a"], trainable["b"], precision=HIGHEST)
        return {"c": self.scale * trainable["c"], "second": second}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns x W + s Cᵀ X (A B)."""
        return linear(x, base) + self._kronecker_product(x, arrays, dropout_key)

    @part("low_rank")
    def _kronecker_product(
        self, x: Float[Array, "*batch d_in"], arrays: Arrays, dropout_key: jax.Array | None
    ) -> Float[Array, "*batch d_out"]:
        x = drop_inputs(x, self.dropout, dropout_key)
        c, second = (arrays[name].astype(x.dtype) for name in ("c", "second"))
        matrix = x.reshape(*x.shape[:-1], c.shape[0], second.shape[0])
        inner = jnp.einsum("...pq,pk->...kq", matrix, c)
        # A copy for each of the k rows, so that the gradient is summed over rows last. Where a mesh
        # shards them, one contraction over tokens and rows gave a wrong gradient.
        copies = jnp.broadcast_to(second, (c.shape[1], *second.shape))
        return jnp.einsum("...kq,kqm->...km", inner, copies).reshape(*x.shape[:-1], -1)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W + s C ⊗ A B."""
        c, second = (arrays[name].astype(jnp.float32) for name in ("c", "second"))
        return base.astype(jnp.float32) + jnp.kron(c, second)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of LoKr."""
        return (LoKrForm,)


def split_size(size: int, factor: int) -> tuple[int, int]:
    """Splits a number of features into two factors, by the rule of LyCORIS.

    Args:
      size: Number of features.
      factor: The first factor, if it divides `size`; otherwise the largest value of the smaller
        factor; -1 for the factors nearest to the square root.

    Example:
      >>> split_size(128, -1), split_size(127, -1), split_size(12, 4), split_size(12, 5)
      ((8, 16), (1, 127), (4, 3), (3, 4))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    small = 1
    for divisor in range(2, size + 1):
        if small * small >= size or divisor > most:
            break
        if size % divisor == 0:
            small = divisor
    first, second = sorted((small, size // small))
    return first, second


@dataclasses.dataclass(frozen=True)
class LoKrForm(RenamingForm):
    """`lokr_w1` is Cᵀ, `lokr_w2_a` is Bᵀ and `lokr_w2_b` is Aᵀ."""

    method: LoKr
    peft_type = "LOKR"
    names = ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
    arrays = ("c", "b", "a")
    transposed = True
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "alpha": ("alpha", 8),
        "decompose_factor": ("decompose_factor", -1),
        "r": ("rank", 8),
    }
    written: ClassVar[Mapping[str, Any]] = {"decompose_both": False, "init_weights": True}
    exact = True
    understood = PeftSettings(
        read={
            "alpha": float,
            "alpha_pattern": Mapping[str, float],
            "decompose_factor": int,
            "r": int,
            "rank_pattern": Mapping[str, int],
        },
        # Dropout of other kinds than here, for training only, and settings of convolutions.
        irrelevant=frozenset(
            {
                "init_weights",
                "module_dropout",
                "rank_dropout",
                "rank_dropout_scale",
                "use_effective_conv2d",
            }
        ),
        fixed={"decompose_both": NEUTRAL},
        compared=("alpha", "alpha_pattern", "decompose_factor", "r", "rank_pattern"),
    )
    patterns = MappingProxyType({"r": "rank_pattern", "alpha": "alpha_pattern"})

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [k, p], [m, r] and [r, q]."""
        r = self.method.rank
        (p, q), (k, m) = (split_size(size, self.method.decompose_factor) for size in (d_in, d_out))
        return {"lokr_w1": (k, p), "lokr_w2_a": (m, r), "lokr_w2_b": (r, q)}
