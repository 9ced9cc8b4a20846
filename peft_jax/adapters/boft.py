"""Implements BOFT: a product of butterfly-structured rotations of the kernel's input."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import (
    block_rotation,
    prefer_rotated_kernel,
    rotated_kernel_product,
)
from kernels_pallas.butterfly import butterfly_rotation, compose_butterfly
from kernels_pallas.cayley import cayley
from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_form import (
    NoPeftFormError,
    PeftForm,
    PeftSettings,
    Shapes,
    setting,
)
from peft_jax.adapters.summed_kernel import away_from_zero
from peft_jax.core import Kernel, linear, name_product
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_fraction, check_positive_int

MOST_FACTORS = 32

SMALLEST_SCALE = 1e-28
"""Magnitude that a smaller scale of an output counts as. Its product with an output is no zero."""

MAX_COMPOSED_BLOCK = 256
"""Maximum size of blocks that are composed from the factors once per step.

Above it the factors are applied one after another. This takes m passes over the activations, but
fewer operations.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFT(AdapterMethod):
    """Orthogonal butterfly fine-tuning, y = ((x M) W) ⊙ scale with M = F_{m-1} ... F_0.

    Each factor is block-diagonal after a permutation, with blocks Q = (I - S)(I + S)⁻¹ for
    skew-symmetric S; see `kernels_pallas.butterfly.butterfly_rotation`. Only the b (b - 1) / 2 free
    entries of each S are stored. Hugging Face PEFT stores b² and projects. Trainable arrays: `r`
    [m, d_in / b, b (b - 1) / 2], initially zero, and `scale` [d_out], initially one.

    Attributes:
      block_size: Block size b; d_in must be divisible by b 2^(m-1).
      n_butterfly_factors: Number of factors m; 1 is a plain block-diagonal rotation (OFT).
      dropout: Probability that a block is replaced by the identity while training. PEFT instead
        replaces a fixed share of the blocks of one random factor.

    Source: Liu et al., 2023, arXiv 2311.06243.
    """

    name: ClassVar[str] = "boft"
    learning_rate: ClassVar[float] = 5e-4
    maps_input: ClassVar[bool] = True

    block_size: int = 8
    n_butterfly_factors: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("block_size", self.block_size)
        check_positive_int("n_butterfly_factors", self.n_butterfly_factors)
        check_fraction("dropout", self.dropout)
        if self.n_butterfly_factors > MOST_FACTORS:
            raise ValueError(
                f"n_butterfly_factors must be at most {MOST_FACTORS}, but is"
                f" {self.n_butterfly_factors}: each doubles the required divisor of the input"
            )
        if self.block_size < 2:
            raise ValueError(
                f"block_size must be at least 2, but is {self.block_size}: a block of size 1 cannot"
                " rotate"
            )
        if self.n_butterfly_factors > 1 and self.block_size % 2:
            raise ValueError(
                f"block_size must be even with {self.n_butterfly_factors} butterfly factors, but is"
                f" {self.block_size}: factors pair half-blocks"
            )

    @property
    def composed_block_size(self) -> int:
        """Size of the blocks of M: b 2^(m-1)."""
        return self.block_size * 2 ** (self.n_butterfly_factors - 1)

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError unless d_in is divisible by b 2^(m-1)."""
        d_in = shape[0]
        if d_in % self.composed_block_size == 0:
            return
        factor = 2 ** (self.n_butterfly_factors - 1)
        sizes = [
            b
            for b in range(2, d_in // factor + 1)
            if d_in % (b * factor) == 0 and (factor == 1 or b % 2 == 0)
        ]
        nearest = sorted(sorted(sizes, key=lambda b: abs(b - self.block_size))[:4])
        help_ = (
            f"block sizes that work: {', '.join(map(str, nearest))}"
            if nearest
            else "no block size works with this many factors; use fewer"
        )
        raise ValueError(
            f"{self.name} with block_size {self.block_size} and n_butterfly_factors"
            f" {self.n_butterfly_factors} needs an input divisible by {self.composed_block_size},"
            f" but {module} has {d_in} inputs; {help_}"
        )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns zeros and ones, with which every factor is the identity."""
        del key, gradient
        d_in, d_out = shape
        b = self.block_size
        r = jnp.zeros((self.n_butterfly_factors, d_in // b, b * (b - 1) // 2), jnp.float32)
        return {"r": r, "scale": jnp.ones((d_out,), jnp.float32)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard blocks as the kernel's input."""
        return {"r": (None, d_in, None), "scale": (d_out,)}, {}

    @part("rotation")
    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the rotation's blocks: composed [d_in / B, B, B] or factors [m, d_in / b, b, b].

        B is `composed_block_size`.
        """
        del constant
        factors = cayley(trainable["r"], self.block_size)
        if dropout_key is not None and self.dropout > 0:
            dropped = jax.random.bernoulli(dropout_key, self.dropout, factors.shape[:2])
            eye = jnp.eye(self.block_size, dtype=factors.dtype)
            factors = jnp.where(dropped[..., None, None], eye, factors)
        if self.composed_block_size <= MAX_COMPOSED_BLOCK:
            return {"blocks": compose_butterfly(factors), "scale": trainable["scale"]}
        return {"factors": factors, "scale": trainable["scale"]}

    def prepared_axes(self, d_in: str | None, d_out: str | None) -> Axes | None:
        """Returns axes that shard blocks as the kernel's input."""
        if self.composed_block_size <= MAX_COMPOSED_BLOCK:
            return {"blocks": (d_in, None, None), "scale": (d_out,)}
        return {"factors": (None, d_in, None, None), "scale": (d_out,)}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns ((x M) W) ⊙ scale."""
        del dropout_key
        return scale_outputs(self._rotated_product(x, base, arrays), arrays["scale"])

    def _rotated_product(
        self, x: Float[Array, "*batch d_in"], base: Kernel, arrays: Arrays
    ) -> Float[Array, "*batch d_out"]:
        """Returns (x M) W, computed as x (M W) if that is faster."""
        plain = isinstance(base, jax.Array) and "blocks" in arrays
        if plain and prefer_rotated_kernel(x, base):
            y = rotated_kernel_product(x, arrays["blocks"], base)
            return name_product(y)
        return linear(self._rotate(x, arrays), base)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns (M W) ⊙ scale."""
        # The transposed map applied to the rows of Wᵀ gives the columns of M W.
        columns = base.astype(jnp.float32).T
        _, transposed = jax.vjp(
            lambda x: self._rotate(
                x, arrays, precision=jax.lax.Precision.HIGHEST, implementation="xla"
            ),
            columns,
        )
        return transposed(columns)[0].T * arrays["scale"].astype(jnp.float32)

    @part("rotation")
    def _rotate(
        self,
        x: Float[Array, "*batch d_in"],
        arrays: Arrays,
        *,
        precision: jax.lax.Precision | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "*batch d_in"]:
        rotate, rotations = (
            (block_rotation, arrays["blocks"])
            if "blocks" in arrays
            else (butterfly_rotation, arrays["factors"])
        )
        return rotate(x, rotations, precision=precision, implementation=implementation)

    def peft_form(self) -> PeftForm | None:
        """Returns PEFT's form; none for a subclass, which may compute something else."""
        if type(self) is not BOFT:
            return None
        return BOFTForm(self) if self.n_butterfly_factors == 1 else ComposedBOFTForm(self)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of separate factors."""
        return (BOFTForm,)


@jax.custom_vjp
def scale_outputs(
    y: Float[Array, "*batch d_out"], scale: Float[Array, " d_out"]
) -> Float[Array, "*batch d_out"]:
    """Returns y ⊙ scale in the dtype of `y`.

    The gradient of the scale divides the result by the scale, so that `y` is not kept: the result's
    reader, such as a nonlinearity, often keeps that anyway. A scale nearer to zero than
    `SMALLEST_SCALE` counts as that.
    """
    return y * _without_zeros(scale, y)


def _without_zeros(scale: Array, y: Array) -> Float[Array, " d_out"]:
    """Returns the scale in the dtype of `y`, without zeros."""
    least = max(SMALLEST_SCALE, float(jnp.finfo(y.dtype).tiny))
    return away_from_zero(scale.astype(y.dtype), least)


def _scale_forward(y: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    scaled = scale_outputs(y, scale)
    return scaled, (scaled, scale)


def _scale_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    scaled, scale = kept
    used = _without_zeros(scale, scaled)
    y = scaled.astype(jnp.float32) / used.astype(jnp.float32)
    dscale = jnp.sum(g.astype(jnp.float32) * y, axis=tuple(range(g.ndim - 1)))
    return g * used, dscale.astype(scale.dtype)


scale_outputs.defvjp(_scale_forward, _scale_backward)


BOFT_SETTINGS = PeftSettings(
    read={"boft_dropout": float},
    # Block sizes and the number of factors are read from the tensors' shapes.
    irrelevant=frozenset(
        {"boft_block_num", "boft_block_size", "boft_n_butterfly_factor", "init_weights"}
    ),
    compared=("boft_block_size", "boft_n_butterfly_factor"),
)

COMPOSED_TOLERANCE = 1e-5
"""Largest error of an entry after PEFT's Cayley transform of a composed rotation."""


@dataclasses.dataclass(frozen=True)
class _BOFTForm(PeftForm, abc.ABC):
    """Defines what both forms of BOFT share."""

    method: BOFT
    peft_type = "BOFT"
    only_bias = "boft_only"
    names = ("boft_R", "boft_s")
    understood = BOFT_SETTINGS

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> BOFT:
        """Returns BOFT with the sizes of the stored tensors.

        Raises:
          ValueError: Modules have different sizes.
        """
        shapes = {shapes["boft_R"]: f"{name}.boft_R" for name, shapes in modules.items()}
        sizes = {(shape[0], shape[-1]) for shape in shapes}
        if len(sizes) > 1 or any(len(shape) != 4 for shape in shapes):
            found = ", ".join(f"{name} {list(shape)}" for shape, name in shapes.items())
            raise ValueError(
                f"has rotations of several sizes ({found}), but all modules must have the same"
                " block size and number of factors"
            )
        ((factors, size),) = sizes
        return BOFT(
            block_size=size,
            n_butterfly_factors=factors,
            dropout=float(setting(config, "boft_dropout", 0.0)),
        )


@dataclasses.dataclass(frozen=True)
class BOFTForm(_BOFTForm):
    """`boft_R` [m, d_in / b, b, b] holds the full S, and `boft_s` [d_out, 1] the scale.

    PEFT without its CUDA extension supports m = 1 only.
    """

    exact = True

    def settings(self) -> dict[str, Any]:
        """Returns the block size, the number of factors and the dropout."""
        return _peft_settings(self.method, self.method.block_size, self.method.n_butterfly_factors)

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
class ComposedBOFTForm(_BOFTForm):
    """Several factors as one factor, their product M, with blocks of size b 2^(m-1).

    Its skew-symmetric blocks are R = (I + M)⁻¹ (I - M), the inverse Cayley transform.
    """

    exact = False

    def settings(self) -> dict[str, Any]:
        """Returns the settings of the one factor."""
        return _peft_settings(self.method, self.method.composed_block_size, 1)

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


def _peft_settings(method: BOFT, block_size: int, factors: int) -> dict[str, Any]:
    return {
        "bias": "none",
        "boft_block_num": 0,
        "boft_block_size": block_size,
        "boft_dropout": method.dropout,
        "boft_n_butterfly_factor": factors,
        "fan_in_fan_out": False,
    }
