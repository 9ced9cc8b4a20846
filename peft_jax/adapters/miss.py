"""Implements MiSS: one matrix that is added to every group of the kernel's rows."""

import dataclasses
from collections.abc import Mapping
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
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_fraction, check_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSS(AdapterMethod):
    """Matrix shard sharing, y = x W + fold(x) D.

    fold adds up the groups of r consecutive inputs; the last group is padded with zeros. So D is
    added to every group of r rows of W. Trainable array: `d` [r, d_out], initially zero.

    Attributes:
      rank: Number of rows r of D.
      dropout: Probability that an input of the second term is dropped while training.

    Source: Kang and Yin, 2024, arXiv 2409.15371.
    """

    name: ClassVar[str] = "miss"
    learning_rate: ClassVar[float] = 1e-4

    rank: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_fraction("dropout", self.dropout)

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the kernel has fewer rows than D."""
        if self.rank > shape[0]:
            raise ValueError(
                f"rank is {self.rank}, but {self.name} on {module} with {shape[0]} inputs needs a"
                f" rank of at most {shape[0]}"
            )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns zeros."""
        del key, gradient
        return {"d": jnp.zeros((self.rank, shape[1]), jnp.float32)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard D as the kernel's output."""
        del d_in
        return {"d": (None, d_out)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns D."""
        del constant, dropout_key
        return {"d": trainable["d"]}

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns axes that shard D as the kernel's output."""
        return self.axes(d_in, d_out)[0]

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns x W + fold(x) D."""
        return linear(x, base) + self._folded_product(x, arrays, dropout_key)

    @part("low_rank")
    def _folded_product(
        self, x: Float[Array, "*batch d_in"], arrays: Arrays, dropout_key: jax.Array | None
    ) -> Float[Array, "*batch d_out"]:
        x = drop_inputs(x, self.dropout, dropout_key)
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % self.rank)])
        groups = padded.reshape(*x.shape[:-1], -1, self.rank)
        folded = jnp.sum(groups, axis=-2, dtype=jnp.float32).astype(x.dtype)
        return linear(folded, arrays["d"])

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W with D added to every group of rows."""
        d_in = base.shape[0]
        groups = -(-d_in // self.rank)
        return (
            base.astype(jnp.float32) + jnp.tile(arrays["d"].astype(jnp.float32), (groups, 1))[:d_in]
        )

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of MiSS."""
        return (MiSSForm,)


@dataclasses.dataclass(frozen=True)
class MiSSForm(RenamingForm):
    """`miss_block` [r, d_out] is D."""

    method: MiSS
    peft_type = "MISS"
    only_bias = "MiSS_only"
    names = ("miss_block",)
    arrays = ("d",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "miss_dropout": ("dropout", 0.0),
        "r": ("rank", 64),
    }
    written: ClassVar[Mapping[str, Any]] = {"init_weights": True}
    exact = True
    understood = PeftSettings(
        read={"miss_dropout": float, "r": int},
        irrelevant=frozenset({"mini_r"}),
        fixed={"init_weights": (True, False)},
        why={"init_weights": "; only MiSS itself is, with true or false"},
        compared=("r",),
    )

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [r, d_out]."""
        del d_in
        return {"miss_block": (self.method.rank, d_out)}
