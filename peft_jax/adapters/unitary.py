"""Implements the unitary adapter: a unitary map of the kernel's input with O(d) parameters."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.unitary import unitary_product
from peft_jax.adapters.method import AdapterMethod, Arrays, Axes, GradientFactors
from peft_jax.core import Kernel, linear
from peft_jax.core.scopes import part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unitary(AdapterMethod):
    """Unitary map before the kernel, y = (U x) W with U = D₃ R₂ F⁻¹ D₂ R₁ F D₁.

    U acts on d_in / 2 complex numbers and preserves norms; see
    `kernels_pallas.unitary.unitary_product`. It is initialized to the identity: phases are zero,
    and the vector of R₂ is the inverse transform of that of R₁, so that the reflections cancel. In
    bfloat16 they cancel to 1 part in 100. Trainable arrays: `phases` [3, d_in / 2] in radians, and
    `reflections` [2, 2, d_in / 2], (first and second reflection) x (real and imaginary part).

    Source: Arjovsky, Shah and Bengio, 2015, arXiv 1511.06464, as an adapter.
    """

    name: ClassVar[str] = "unitary"
    learning_rate: ClassVar[float] = 5e-4

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError unless d_in is even, because pairs are read as complex numbers."""
        if shape[0] % 2:
            raise ValueError(
                f"{self.name} needs an even number of inputs, but {module} has {shape[0]}; exclude"
                " the module"
            )

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns zero phases and a random reflection that the second one cancels."""
        del gradient
        n = shape[0] // 2
        parts = jax.random.normal(key, (2, n), jnp.float32)
        first = parts / jnp.linalg.norm(parts)
        second = jnp.fft.ifft(jax.lax.complex(first[0], first[1]), norm="ortho")
        reflections = jnp.stack([first, jnp.stack([second.real, second.imag])])
        return {"phases": jnp.zeros((3, n), jnp.float32), "reflections": reflections}, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns unsharded axes, because the transform mixes all features of a small array."""
        del d_in, d_out
        return {"phases": (None, None), "reflections": (None, None, None)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns the trainable arrays in float32."""
        del constant, dropout_key
        return {name: array.astype(jnp.float32) for name, array in trainable.items()}

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns (U x) W."""
        del dropout_key
        rotated = part("rotation")(unitary_product)(x, arrays["phases"], arrays["reflections"])
        return linear(rotated, base)

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        """Returns U W, with U as a real orthogonal map of row vectors."""
        # The transposed map applied to the rows of Wᵀ gives the columns of U W.
        columns = base.astype(jnp.float32).T
        _, transposed = jax.vjp(
            lambda x: unitary_product(
                x, arrays["phases"], arrays["reflections"], implementation="xla"
            ),
            columns,
        )
        return transposed(columns)[0].T
