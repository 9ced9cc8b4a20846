"""Implements RandLora: a change of full rank, from random bases that all kernels share."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peft_jax.adapters.method import (
    AdapterMethod,
    Arrays,
    Axes,
    GradientFactors,
    drop_inputs,
)
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import (
    NoPeftFormError,
    PeftForm,
    PeftSettings,
    Shapes,
)
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part
from peft_jax.core.validation import (
    check_count,
    check_fraction,
    check_positive,
    check_positive_int,
)

HIGHEST = jax.lax.Precision.HIGHEST

MAX_RANK = 512
"""Rank of the products that are computed at once, unless a single basis has more."""

_DEVIATION = math.sqrt((256**2 - 1) / 12)
"""Standard deviation of a random byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLora(AdapterMethod):
    """RandLora, y = x W + s x R with R = Σ_j (A_j ⊙ λ_j γ_j) B_j of full rank.

    Let w and u be the larger and the smaller one of d_in and d_out. A kernel has n = ⌈u / r⌉ pairs
    of random bases: one A [r, u] for all pairs, and B [w, n, r]. With C[k] = λ_k A[k // n] ⊙
    γ[k mod n] for the n r rows of λ [r, n], R is Cᵀ Bᵀ if the kernel is wider than high, and B C
    otherwise. R is as large as the kernel, so it is computed and multiplied in pieces of rank
    `MAX_RANK`.

    A and B begin as those of every larger kernel, and are not held: each use draws them again,
    forward and backward, which costs one random byte for every entry of the kernel. Trainable
    arrays: `lam` [r, n], initially zero, and `gamma` [n, u], initially 1 / max(n, u).

    Attributes:
      rank: Rank r of a basis. Small ranks have more trainable parameters than large ones.
      alpha: Numerator of the scale s = alpha / rank.
      seed: Seed of the bases.
      dropout: Probability that an input of a basis is dropped while training.
      hold_bases: Whether the kernel of every layer holds its bases as constants, which takes as
        much memory as the kernels in float32 and saves the draws. Adapters of Hugging Face PEFT
        load so, because their bases are other random numbers.

    Source: Albert et al., 2025, arXiv 2502.00987, eq. 3. The pairs of rows of C and columns of B
    are those of Hugging Face PEFT.
    """

    name: ClassVar[str] = "randlora"
    learning_rate: ClassVar[float] = 1e-4
    no_decay: ClassVar[tuple[str, ...]] = ("gamma",)

    rank: int = 32
    alpha: float = 640.0
    seed: int = 0
    dropout: float = 0.0
    hold_bases: bool = False

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_count("seed", self.seed)
        check_fraction("dropout", self.dropout)

    def pairs(self, d_in: int, d_out: int) -> int:
        """Returns the number n of pairs of bases."""
        return -(-min(d_in, d_out) // self.rank)

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns zero lam and constant gamma, and the bases if they are held."""
        del key, gradient
        n, small = self.pairs(*shape), min(shape)
        trainable = {
            "lam": jnp.zeros((self.rank, n), jnp.float32),
            "gamma": jnp.full((n, small), 1.0 / max(n, small), jnp.float32),
        }
        if not self.hold_bases:
            return trainable, {}
        return trainable, {"a": self.base_a(small), "b": self.base_b(max(shape), jnp.arange(n))}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that are not sharded."""
        del d_in, d_out
        constant = {"a": (None, None), "b": (None, None, None)} if self.hold_bases else {}
        return {"lam": (None, None), "gamma": (None, None)}, constant

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the arrays as they are."""
        del dropout_key
        return {**trainable, **constant}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns x W + s x R."""
        y = linear(x, base)
        x = drop_inputs(x, self.dropout, dropout_key)
        shape = (x.shape[-1], y.shape[-1])

        @part("low_rank")
        def product(piece: Int[Array, ""]) -> Float[Array, "*batch d_out"]:
            first, second = self._factors(piece, shape, arrays)
            return linear(linear(x, first), second)

        return y + self._sum(product, shape, jnp.zeros_like(y))

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W + s R."""
        d_in, d_out = base.shape

        def product(piece: Int[Array, ""]) -> Float[Array, "d_in d_out"]:
            first, second = self._factors(piece, (d_in, d_out), arrays)
            return jnp.matmul(first, second, precision=HIGHEST)

        kernel = base.astype(jnp.float32)
        return kernel + self._sum(product, (d_in, d_out), jnp.zeros_like(kernel))

    def _sum(self, product: Any, shape: tuple[int, int], zeros: jax.Array) -> jax.Array:
        """Returns the sum of the products of all pieces.

        Bases are drawn again in the backward pass, as a scan would keep those of all pieces.
        """

        def add(total: jax.Array, piece: Int[Array, ""]) -> tuple[jax.Array, None]:
            return total + product(piece), None

        pieces = -(-self.pairs(*shape) // self._together(shape))
        if pieces == 1:
            return jax.checkpoint(product)(jnp.zeros((), jnp.int32))
        body = jax.checkpoint(add, prevent_cse=False)
        return jax.lax.scan(body, zeros, jnp.arange(pieces, dtype=jnp.int32))[0]

    def _together(self, shape: tuple[int, int]) -> int:
        """Returns the number of pairs in a piece."""
        return max(1, min(self.pairs(*shape), MAX_RANK // self.rank))

    def _factors(
        self, piece: Int[Array, ""], shape: tuple[int, int], arrays: Arrays
    ) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
        """Returns the two factors of a piece of s R, in float32."""
        d_in, d_out = shape
        n, small = arrays["gamma"].shape
        count = self._together(shape)
        bases = piece * count + jnp.arange(count, dtype=jnp.int32)
        k = piece * count * self.rank + jnp.arange(count * self.rank, dtype=jnp.int32)
        inside = k < n * self.rank
        k = jnp.where(inside, k, 0)
        lam, gamma = (arrays[name].astype(jnp.float32) for name in ("lam", "gamma"))
        weights = jnp.where(inside, lam.reshape(-1)[k], 0.0) * (self.alpha / self.rank)
        if self.hold_bases:
            a = arrays["a"].astype(jnp.float32)
            b = jnp.take(arrays["b"], jnp.minimum(bases, n - 1), axis=1).astype(jnp.float32)
        else:
            a, b = self.base_a(small), self.base_b(max(shape), bases)
        c = a[k // n] * gamma[k % n] * weights[:, None]
        b = b.reshape(max(shape), -1)
        return (c.T, b.T) if d_in <= d_out else (b, c)

    def base_a(self, small: int) -> Float[Array, "rank small"]:
        """Returns A of a kernel whose smaller side is `small`."""
        return _rows(self._key(0), small, self.rank).T

    def base_b(self, wide: int, bases: Int[Array, " bases"]) -> Float[Array, "wide bases rank"]:
        """Returns some bases of B of a kernel whose larger side is `wide`."""
        key = self._key(1)
        drawn = jax.vmap(lambda basis: _rows(jax.random.fold_in(key, basis), wide, self.rank))
        return jnp.moveaxis(drawn(bases), 0, 1)

    def _key(self, index: int) -> jax.Array:
        # Without the barrier the compiler draws the numbers itself, which takes it minutes.
        data = jax.lax.optimization_barrier(jax.random.key_data(jax.random.key(self.seed)))
        return jax.random.fold_in(jax.random.wrap_key_data(data), index)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of RandLora."""
        return (RandLoraForm,)


def _rows(key: jax.Array, rows: int, columns: int) -> Float[Array, "rows columns"]:
    """Draws a matrix of mean 0 and variance 1, whose rows do not depend on their number.

    An entry takes a byte, so that a random word serves four of them.
    """

    def one(index: Int[Array, ""]) -> Float[Array, " columns"]:
        words = jax.random.bits(jax.random.fold_in(key, index), (-(-columns // 4),), jnp.uint32)
        values = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:columns]
        return (values.astype(jnp.float32) - 127.5) / _DEVIATION

    return jax.vmap(one)(jnp.arange(rows, dtype=jnp.int32))


@dataclasses.dataclass(frozen=True)
class RandLoraForm(RenamingForm):
    """`randlora_lambda` and `randlora_gamma` are those of a kernel, and the bases are shared."""

    method: RandLora
    peft_type = "RANDLORA"
    only_bias = "randlora_only"
    names = ("randlora_gamma", "randlora_lambda")
    arrays = ("gamma", "lam")
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "r": ("rank", 32),
        "randlora_alpha": ("alpha", 640),
        "randlora_dropout": ("dropout", 0.0),
    }
    written: ClassVar[Mapping[str, Any]] = {"fan_in_fan_out": False, "save_projection": True}
    read_as: ClassVar[Mapping[str, Any]] = {"hold_bases": True}
    shared_names = ("randlora_A", "randlora_B")
    exact = False
    understood = PeftSettings(
        read={"r": int, "randlora_alpha": float, "randlora_dropout": float},
        # How PEFT has drawn the bases, which are in the file.
        irrelevant=frozenset({"init_weights", "projection_prng_key", "sparse", "very_sparse"}),
        fixed={"save_projection": (None, True)},
        why={"save_projection": "; the random bases must be in the file"},
    )

    def settings(self) -> dict[str, Any]:
        """Returns the rank and alpha, and that the bases are in the file."""
        return super().settings() | {"projection_prng_key": self.method.seed}

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [n, u] and [r, n]."""
        n = self.method.pairs(d_in, d_out)
        return {
            "randlora_gamma": (n, min(d_in, d_out)),
            "randlora_lambda": (self.method.rank, n),
        }

    def shared(
        self,
        shapes: Sequence[tuple[int, int]],
        constants: Sequence[Mapping[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Returns the bases of the largest kernel that PEFT's rule allows for.

        Of held bases, entries that no kernel uses are zero.
        """
        sizes = tuple(max(side) for side in zip(*shapes, strict=True))
        small, wide, n = min(sizes), max(sizes), self.method.pairs(*sizes)
        if not self.method.hold_bases:
            a = np.asarray(self.method.base_a(small))
            b = np.asarray(self.method.base_b(wide, jnp.arange(n)))
        else:
            a = np.zeros((self.method.rank, small), np.float32)
            b = np.zeros((wide, n, self.method.rank), np.float32)
            for own in constants:
                a[:, : own["a"].shape[1]] = own["a"]
                b[: own["b"].shape[0], : own["b"].shape[1]] = own["b"]
        return {"randlora_A": a[:, None], "randlora_B": b}

    def constants(
        self, shared: Mapping[str, np.ndarray], d_in: int, d_out: int
    ) -> dict[str, np.ndarray]:
        """Returns the bases of a kernel.

        Raises:
          NoPeftFormError: The shared bases are too small.
        """
        n, small, wide, rank = (
            self.method.pairs(d_in, d_out),
            min(d_in, d_out),
            max(d_in, d_out),
            self.method.rank,
        )
        a, b = (shared[name] for name in self.shared_names)
        if a.shape != (rank, 1, max(small, a.shape[-1])) or (
            b.shape != (max(wide, b.shape[0]), max(n, b.shape[1]), rank)
        ):
            raise NoPeftFormError(
                f"randlora_A is {list(a.shape)} and randlora_B {list(b.shape)}, but a kernel of"
                f" [{d_in}, {d_out}] needs at least [{rank}, 1, {small}] and [{wide}, {n}, {rank}]"
            )
        return {"a": a[:, 0, :small], "b": b[:wide, :n]}
