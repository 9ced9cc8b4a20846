"""Implements FourierFT: a change of the kernel with few trainable Fourier coefficients."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from kernels_pallas.unitary.xla import row_by_row
from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes
from peft_jax.adapters.random_entries import entries
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_count, check_positive, check_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(AdapterMethod):
    """Fourier fine-tuning, y = x (W + s D) with D[q, p] = Re F⁻¹(C)[p, q].

    C [d_out, d_in] is a spectrum that is zero but for n random entries, at the same places in all
    kernels of a shape, and F⁻¹ the inverse discrete Fourier transform of both axes. D is never
    formed: x D takes a transform of the input, products with the n coefficients, and a transform
    of their sums, which is O(d log d + n) a token. Trainable array: `spectrum` [n], the
    coefficients, initially zero.

    Attributes:
      n_frequency: Number n of coefficients of a kernel.
      scaling: Scale s.
      seed: Seed of the places. Hugging Face PEFT draws the same places from it.

    Source: Gao et al., 2024, arXiv 2405.03003, eqs. 2 to 4. The coefficients start at zero, with
    which the function does not change; the paper draws them from the normal distribution.
    """

    name: ClassVar[str] = "fourierft"
    learning_rate: ClassVar[float] = 1e-2

    n_frequency: int = 1000
    scaling: float = 150.0
    seed: int = 777

    def __post_init__(self) -> None:
        check_positive_int("n_frequency", self.n_frequency)
        check_positive("scaling", self.scaling)
        check_count("seed", self.seed)

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the kernel has fewer entries than there are coefficients."""
        d_in, d_out = shape
        if self.n_frequency > d_in * d_out:
            raise ValueError(
                f"n_frequency is {self.n_frequency}, but {module} has only {d_in} x {d_out} ="
                f" {d_in * d_out} entries"
            )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns zero coefficients; no constant arrays."""
        del key, shape, gradient
        return {"spectrum": jnp.zeros((self.n_frequency,), jnp.float32)}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that are not sharded."""
        del d_in, d_out
        return {"spectrum": (None,)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the coefficients."""
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
        """Returns x W + s x D."""
        del dropout_key
        y = linear(x, base)
        return y + self._change(x, arrays["spectrum"], y.shape[-1]).astype(y.dtype)

    @part("low_rank")
    def _change(
        self, x: Float[Array, "*batch d_in"], spectrum: Float[Array, " n"], d_out: int
    ) -> Float[Array, "*batch d_out"]:
        """Returns s x D.

        With ω = exp(2πi / d), x D at output p is Σ_k c_k Re(X[i_k] ω^(o_k p)) / (d_in d_out), where
        X[i] = Σ_q x_q ω^(i q). As x is real, X is the conjugate of its forward transform.
        """
        d_in = x.shape[-1]
        rows, columns = entries(self.seed, d_out, d_in, self.n_frequency)
        complex_x = x.astype(jnp.float32).astype(jnp.complex64)
        of_input = jnp.conj(_in_memory(jnp.fft.fft, complex_x))
        weighted = of_input[..., columns] * spectrum.astype(of_input.dtype)
        empty = jnp.zeros((*x.shape[:-1], d_out), weighted.dtype)
        of_output = empty.at[..., rows].add(weighted)
        return self.scaling / d_in * _in_memory(jnp.fft.ifft, of_output).real

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns W + s D."""
        d_in, d_out = base.shape
        rows, columns = entries(self.seed, d_out, d_in, self.n_frequency)
        whole = jnp.zeros((d_out, d_in), jnp.float32).at[rows, columns].set(arrays["spectrum"])
        return base.astype(jnp.float32) + self.scaling * jnp.fft.ifft2(whole).real.T

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of FourierFT."""
        return (FourierFTForm,)


def _in_memory(
    transform: Callable[[jax.Array], jax.Array], z: Complex[Array, "*batch d"]
) -> Complex[Array, "*batch d"]:
    """Returns a transform of rows that are contiguous in memory, forward and backward."""
    return row_by_row(transform(row_by_row(z)))


@dataclasses.dataclass(frozen=True)
class FourierFTForm(RenamingForm):
    """`fourierft_spectrum` [n] holds the coefficients; PEFT draws their places from the seed."""

    method: FourierFT
    peft_type = "FOURIERFT"
    only_bias = "fourier_only"
    names = ("fourierft_spectrum",)
    arrays = ("spectrum",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "n_frequency": ("n_frequency", 1000),
        "random_loc_seed": ("seed", 777),
        "scaling": ("scaling", 150),
    }
    written: ClassVar[Mapping[str, Any]] = {"fan_in_fan_out": False}
    exact = True
    understood = PeftSettings(
        read={"n_frequency": int, "scaling": float, "random_loc_seed": int},
        irrelevant=frozenset({"init_weights"}),
        why={"n_frequency_pattern": "; all kernels have the same number of coefficients here"},
        fixed={"n_frequency_pattern": (None, {})},
        compared=("n_frequency", "random_loc_seed", "scaling"),
    )

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [n]."""
        del d_in, d_out
        return {"fourierft_spectrum": (self.method.n_frequency,)}
