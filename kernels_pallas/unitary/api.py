"""The unitary product's public function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


def unitary_product(
    x: Float[Array, "*batch d"],
    phases: Float[Array, "3 n"],
    reflections: Float[Array, "2 2 n"],
) -> Float[Array, "*batch d"]:
    """The unitary map U = D₃ R₂ F⁻¹ D₂ R₁ F D₁ of complex vectors held as real ones.

    The first half of the features is read as real parts and the second as imaginary parts of
    n = d / 2 complex numbers. D are phases, R Householder reflections, F the unitary discrete
    Fourier transform. Source: Arjovsky, Shah and Bengio, 2015, arXiv 1511.06464, eq. 6; their
    fixed permutation is the identity here, without which no choice of the other factors would
    start as the identity.

    Args:
      x: activations [..., d], d even.
      phases: the angles of D₁, D₂, D₃, radians, [3, n], float32.
      reflections: the vectors of R₁ and R₂, real parts and imaginary parts, [2, 2, n], float32;
        their lengths do not matter.

    Returns:
      [..., d] in the dtype of `x`; computed in float32. Norms are preserved.

    Raises:
      ValueError: when d is not 2 n.
    """
    n = phases.shape[-1]
    if x.shape[-1] != 2 * n:
        raise ValueError(f"{n} complex features are {2 * n} real ones; the input has {x.shape[-1]}")
    d1, d2, d3 = jax.lax.complex(jnp.cos(phases), jnp.sin(phases))
    v1, v2 = jax.lax.complex(reflections[:, 0], reflections[:, 1])
    z = jax.lax.complex(*jnp.split(x.astype(jnp.float32), 2, axis=-1))
    z = _reflect(jnp.fft.fft(z * d1, norm="ortho"), v1)
    z = _reflect(jnp.fft.ifft(z * d2, norm="ortho"), v2) * d3
    return jnp.concatenate([z.real, z.imag], axis=-1).astype(x.dtype)


def _reflect(z: Complex[Array, "*batch n"], v: Complex[Array, " n"]) -> Complex[Array, "*batch n"]:
    """The Householder reflection z - 2 v (v* z) / (v* v) of each row."""
    squared = jnp.sum(jnp.real(v * jnp.conj(v)))
    along = jnp.sum(z * jnp.conj(v), axis=-1, keepdims=True)
    return z - (2.0 / squared).astype(z.dtype) * along * v
