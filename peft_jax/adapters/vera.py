"""Implements VeRA: random projections that all kernels share, scaled by trainable vectors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.method import (
    AdapterMethod,
    Arrays,
    Axes,
    GradientFactors,
    drop_inputs,
)
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import PeftForm, Shapes
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part
from peft_jax.core.validation import (
    check_count,
    check_fraction,
    check_positive,
    check_positive_int,
)

HIGHEST = jax.lax.Precision.HIGHEST

WIDTH = 4096
"""Number of inputs for which A's entries have He et al.'s bound, for every kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(AdapterMethod):
    """Vector-based random matrix adaptation, y = x W + (((x A) ⊙ d) B) ⊙ b.

    A [d_in, r] and B [r, d_out] are the first rows and columns of two random matrices that all
    kernels share. They are not held: each use draws them again from `seed`, which costs r random
    numbers for every input and output. Trainable arrays: `d` [r], initially `d_initial`, and `b`
    [d_out], initially zero.

    Attributes:
      rank: Rank r.
      d_initial: Initial value of d.
      seed: Seed of the projections.
      dropout: Probability that an input of A is dropped while training.

    Source: Kopiczko, Blankevoort and Asano, 2023, arXiv 2310.11454, eq. 2. Entries are uniform
    within ±√(6 / n) (He et al.), where n is the rank for B, and 4096 for A, whatever the kernel's
    width: so the kernels' matrices have common rows.
    """

    name: ClassVar[str] = "vera"
    learning_rate: ClassVar[float] = 4e-3
    no_decay: ClassVar[tuple[str, ...]] = ("d",)

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_positive("d_initial", self.d_initial)
        check_count("seed", self.seed)
        check_fraction("dropout", self.dropout)

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns constant d and zero b."""
        del key, gradient
        return {
            "d": jnp.full((self.rank,), self.d_initial, jnp.float32),
            "b": jnp.zeros((shape[1],), jnp.float32),
        }, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard b as the kernel's output."""
        del d_in
        return {"d": (None,), "b": (d_out,)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns both vectors."""
        del constant, dropout_key
        return dict(trainable)

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns x W + (((x A) ⊙ d) B) ⊙ b."""
        return linear(x, base) + self._projected(x, arrays, dropout_key)

    @part("low_rank")
    def _projected(
        self, x: Float[Array, "*batch d_in"], arrays: Arrays, dropout_key: jax.Array | None
    ) -> Float[Array, "*batch d_out"]:
        x = drop_inputs(x, self.dropout, dropout_key)
        a, b = self.projections(x.shape[-1], arrays["b"].shape[0])
        inner = linear(x, a) * arrays["d"].astype(x.dtype)
        return linear(inner, b) * arrays["b"].astype(x.dtype)

    def projections(
        self, d_in: int, d_out: int
    ) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
        """Returns A and B of a kernel, which begin as those of every larger kernel."""
        # Without the barrier the compiler draws the numbers itself, which takes it minutes.
        data = jax.lax.optimization_barrier(jax.random.key_data(jax.random.key(self.seed)))
        of_a, of_b = jax.random.split(jax.random.wrap_key_data(data))
        a = _rows(of_a, d_in, self.rank, math.sqrt(6.0 / WIDTH))
        b = _rows(of_b, d_out, self.rank, math.sqrt(6.0 / self.rank))
        return a, b.T

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W + A diag(d) B diag(b)."""
        a, b = self.projections(*base.shape)
        d, scale = (arrays[name].astype(jnp.float32) for name in ("d", "b"))
        return base.astype(jnp.float32) + jnp.matmul(a * d, b, precision=HIGHEST) * scale

    def peft_form(self) -> PeftForm | None:
        """Returns PEFT's form; none for a subclass, which may compute something else."""
        return VeRAForm(self) if type(self) is VeRA else None


def _rows(key: jax.Array, rows: int, columns: int, bound: float) -> jax.Array:
    """Draws a matrix whose rows do not depend on their number."""

    def one(index: jax.Array) -> jax.Array:
        row_key = jax.random.fold_in(key, index)
        return jax.random.uniform(row_key, (columns,), jnp.float32, -bound, bound)

    return jax.vmap(one)(jnp.arange(rows))


@dataclasses.dataclass(frozen=True)
class VeRAForm(RenamingForm):
    """`vera_lambda_d` is d and `vera_lambda_b` is b; `vera_A` and `vera_B` are Aᵀ and Bᵀ of all.

    It is written only: PEFT's own projections are other random numbers.
    """

    method: VeRA
    peft_type = "VERA"
    only_bias = "vera_only"
    names = ("vera_lambda_b", "vera_lambda_d")
    arrays = ("b", "d")
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "d_initial": ("d_initial", 0.1),
        "projection_prng_key": ("seed", 0),
        "r": ("rank", 256),
        "vera_dropout": ("dropout", 0.0),
    }
    written: ClassVar[Mapping[str, Any]] = {"save_projection": True}
    exact = False

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [d_out] and [r]."""
        del d_in
        return {"vera_lambda_b": (d_out,), "vera_lambda_d": (self.method.rank,)}

    def shared(
        self, shapes: Sequence[tuple[int, int]], constants: Sequence[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Returns the projections of the widest kernels."""
        del constants
        a, b = self.method.projections(*(max(sizes) for sizes in zip(*shapes, strict=True)))
        return {"vera_A": np.asarray(a.T), "vera_B": np.asarray(b.T)}
