"""Implements HRA: a product of Householder reflections of the kernel's input."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.adapters.low_rank import low_rank_product
from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import NEUTRAL, PeftForm, PeftSettings, Shapes
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_positive_int

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRA(AdapterMethod):
    """Householder reflection adaptation, y = (x H_r … H_2 H_1) W with H = I - 2 u uᵀ / |u|².

    The product of the reflections is applied as I - U T Uᵀ (the compact WY form of Schreiber and
    Van Loan, 1989): U has the unit vectors as columns, and T is lower triangular with
    T⁻¹ = ½ I + stril(Uᵀ U). So a token costs as much as with LoRA of rank r. Neighboring vectors
    start equal, so that their reflections cancel. Trainable array: `u` [d_in, r].

    Attributes:
      rank: Number of reflections r; it must be even.

    Source: Yuan et al., 2024, arXiv 2405.17484, eq. 2, without the regularization of orthogonality
    (lambda = 0, Hugging Face PEFT's default).
    """

    name: ClassVar[str] = "hra"
    learning_rate: ClassVar[float] = 5e-4
    maps_input: ClassVar[bool] = True

    rank: int = 8

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        if self.rank % 2:
            raise ValueError(
                f"rank must be even, but is {self.rank}: reflections start in pairs that cancel"
            )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns pairs of equal random unit vectors."""
        del gradient
        half = jax.random.normal(key, (shape[0], self.rank // 2), jnp.float32)
        return {"u": jnp.repeat(half / jnp.linalg.norm(half, axis=0), 2, axis=1)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard vectors as the kernel's input."""
        del d_out
        return {"u": (d_in, None)}, {}

    @part("rotation")
    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns U and -T Uᵀ."""
        del constant, dropout_key
        u = trainable["u"].astype(jnp.float32)
        u = u / jnp.linalg.norm(u, axis=0)
        gram = jnp.matmul(u.T, u, precision=HIGHEST)
        inverse = jnp.tril(gram, -1) + 0.5 * jnp.eye(self.rank)
        return {"u": u, "t": -jax.scipy.linalg.solve_triangular(inverse, u.T, lower=True)}

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns axes that shard both arrays as the kernel's input."""
        del d_out
        return {"u": (d_in, None), "t": (None, d_in)}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns (x - (x U) T Uᵀ) W."""
        del dropout_key
        change = part("rotation")(low_rank_product)(x, arrays["u"], arrays["t"])
        return linear(x + change, base)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W - U T Uᵀ W."""
        kernel = base.astype(jnp.float32)
        rows = jnp.matmul(arrays["t"], kernel, precision=HIGHEST)
        return kernel + jnp.matmul(arrays["u"], rows, precision=HIGHEST)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of HRA."""
        return (HRAForm,)


@dataclasses.dataclass(frozen=True)
class HRAForm(RenamingForm):
    """`hra_u` [d_in, r] holds the vectors."""

    method: HRA
    peft_type = "HRA"
    only_bias = "hra_only"
    names = ("hra_u",)
    arrays = ("u",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {"r": ("rank", 8)}
    written: ClassVar[Mapping[str, Any]] = {"apply_GS": False}
    exact = True
    understood = PeftSettings(
        read={"r": int},
        irrelevant=frozenset({"init_weights"}),
        fixed={"apply_GS": NEUTRAL},
        why={"apply_GS": "; orthogonalized reflections do not start as the identity"},
        compared=("r",),
    )

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [d_in, r]."""
        del d_out
        return {"hra_u": (d_in, self.method.rank)}
