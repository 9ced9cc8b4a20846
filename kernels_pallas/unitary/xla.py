"""The unitary product with XLA's Fourier transform, for CPUs and wherever no kernel can run."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Complex, Float

Gradients = tuple[Float[Array, "*batch d"], Float[Array, "3 n"], Float[Array, "2 2 n"]]


def forward(
    x: Float[Array, "*batch d"],
    phases: Float[Array, "3 n"],
    reflections: Float[Array, "2 2 n"],
    *,
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "*batch d"]]:
    """Returns (y,) with y = U x, in float32 whatever the precision."""
    del precision
    d1, d2, d3 = jax.lax.complex(jnp.cos(phases), jnp.sin(phases))
    v1, v2 = jax.lax.complex(reflections[:, 0], reflections[:, 1])
    z = jax.lax.complex(*jnp.split(x.astype(jnp.float32), 2, axis=-1))
    z = _reflect(jnp.fft.fft(row_by_row(z * d1), norm="ortho"), v1)
    z = _reflect(jnp.fft.ifft(row_by_row(z * d2), norm="ortho"), v2) * d3
    return (jnp.concatenate([z.real, z.imag], axis=-1).astype(x.dtype),)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    phases: Float[Array, "3 n"],
    reflections: Float[Array, "2 2 n"],
    *,
    precision: jax.lax.Precision | None,
) -> Gradients:
    """Returns (dx, dphases, dreflections) for the gradient g of y; recomputes the product."""
    _, transposed = jax.vjp(
        lambda *arrays: forward(*arrays, precision=precision)[0], x, phases, reflections
    )
    return transposed(g)


def row_by_row(z: Complex[Array, "*batch n"]) -> Complex[Array, "*batch n"]:
    """Constrains rows to be contiguous in memory on a CPU, as its transform requires.

    In JAX 0.12 the CPU compiler omits this for rows that come from other devices, and the program
    fails at run time. The TPU compiler does not support this constraint on complex numbers.
    """
    return jax.lax.platform_dependent(z, cpu=_in_rows, default=lambda z: z)


def _in_rows(z: Complex[Array, "*batch n"]) -> Complex[Array, "*batch n"]:
    return with_layout_constraint(z, Layout(major_to_minor=tuple(range(z.ndim))))


def _reflect(z: Complex[Array, "*batch n"], v: Complex[Array, " n"]) -> Complex[Array, "*batch n"]:
    """Applies the Householder reflection z - 2 v (v* z) / (v* v) to each row."""
    squared = jnp.sum(jnp.real(v * jnp.conj(v)))
    along = jnp.sum(z * jnp.conj(v), axis=-1, keepdims=True)
    return z - (2.0 / squared).astype(z.dtype) * along * v
