"""A Fourier transform of n = n₁ n₂ numbers as two small matrix products of real arrays.

With the index j = n₂ j₁ + j₂ of the input and k = k₁ + n₁ k₂ of the result,

    e^(-2πi jk/n) = e^(-2πi j₁k₁/n₁) · e^(-2πi j₂k₁/n) · e^(-2πi j₂k₂/n₂):

which is a transform over j₁, a product with twiddle factors [k₁, j₂], and a transform over j₂. The
result has the transposed order [k₁, k₂]. Parameters that multiply it are stored in the same order,
which costs nothing. The inverse transform starts from that order and ends in the first one.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def matrix(n: int, padded: int) -> np.ndarray:
    """Returns the unitary transform [padded, padded], complex128, symmetric; zeros past n."""
    angles = np.outer(np.arange(n), np.arange(n)) % n
    found = np.zeros((padded, padded), np.complex128)
    found[:n, :n] = np.exp(-2j * np.pi / n * angles) / np.sqrt(n)
    return found


@functools.cache
def twiddles(n1: int, n2: int, padded: int) -> np.ndarray:
    """Returns the twiddle factors [2, padded, n2], float32 real and imaginary parts."""
    found = np.zeros((padded, n2), np.complex128)
    found[:n1] = np.exp(-2j * np.pi / (n1 * n2) * np.outer(np.arange(n1), np.arange(n2)))
    return np.stack([found.real, found.imag]).astype(np.float32)


@functools.cache
def left_matrix(n: int, padded: int) -> np.ndarray:
    """Returns the transform of columns of real parts above imaginary parts, float64."""
    f = matrix(n, padded)
    return np.block([[f.real, -f.imag], [f.imag, f.real]])


@functools.cache
def right_matrix(n: int) -> np.ndarray:
    """Returns the transform [2 n, 2 n] of rows of real parts beside imaginary parts, float64."""
    f = matrix(n, n)
    return np.block([[f.real, f.imag], [-f.imag, f.real]])


def by_index(a: Float[Array, "*parts n"], n1: int) -> Float[Array, "*parts n1 n2"]:
    """Reshapes to [j₁, j₂], the order before the transform."""
    return a.reshape(*a.shape[:-1], n1, -1)


def by_frequency(a: Float[Array, "*parts n"], n1: int) -> Float[Array, "*parts n1 n2"]:
    """Reshapes to [k₁, k₂], the order after the transform."""
    return jnp.swapaxes(a.reshape(*a.shape[:-1], -1, n1), -1, -2)


def from_index(a: Float[Array, "*parts n1 n2"]) -> Float[Array, "*parts n"]:
    """Inverts `by_index`."""
    return a.reshape(*a.shape[:-2], -1)


def from_frequency(a: Float[Array, "*parts n1 n2"]) -> Float[Array, "*parts n"]:
    """Inverts `by_frequency`."""
    return jnp.swapaxes(a, -1, -2).reshape(*a.shape[:-2], -1)
