"""A Fourier transform of n = n₁ n₂ numbers as two small matrix products, as real arrays.

With the index j = n₂ j₁ + j₂ of what is transformed, and k = k₁ + n₁ k₂ of the result,

    e^(-2πi jk/n) = e^(-2πi j₁k₁/n₁) · e^(-2πi j₂k₁/n) · e^(-2πi j₂k₂/n₂):

a transform over j₁, a product with twiddle factors [k₁, j₂], a transform over j₂. The result lies
as [k₁, k₂], transposed: the parameters that meet it there are laid the same way, which costs
nothing, and the transform back starts from that order and ends in the first one.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def matrix(n: int, padded: int) -> np.ndarray:
    """The unitary transform [padded, padded], complex128, symmetric; zeros beyond n."""
    angles = np.outer(np.arange(n), np.arange(n)) % n
    found = np.zeros((padded, padded), np.complex128)
    found[:n, :n] = np.exp(-2j * np.pi / n * angles) / np.sqrt(n)
    return found


@functools.cache
def twiddles(n1: int, n2: int, padded: int) -> np.ndarray:
    """The factors between the two transforms, [2, padded, n2], float32 real and imaginary parts."""
    found = np.zeros((padded, n2), np.complex128)
    found[:n1] = np.exp(-2j * np.pi / (n1 * n2) * np.outer(np.arange(n1), np.arange(n2)))
    return np.stack([found.real, found.imag]).astype(np.float32)


@functools.cache
def left_matrix(n: int, padded: int) -> np.ndarray:
    """What turns columns of real parts above imaginary parts, [2 padded, 2 padded], float64."""
    f = matrix(n, padded)
    return np.block([[f.real, -f.imag], [f.imag, f.real]])


@functools.cache
def right_matrix(n: int) -> np.ndarray:
    """What turns rows of real parts beside imaginary parts, [2 n, 2 n], float64."""
    f = matrix(n, n)
    return np.block([[f.real, f.imag], [-f.imag, f.real]])


def by_index(a: Float[Array, "*parts n"], n1: int) -> Float[Array, "*parts n1 n2"]:
    """As [j₁, j₂], the order before the transform."""
    return a.reshape(*a.shape[:-1], n1, -1)


def by_frequency(a: Float[Array, "*parts n"], n1: int) -> Float[Array, "*parts n1 n2"]:
    """As [k₁, k₂], the order after the transform."""
    return jnp.swapaxes(a.reshape(*a.shape[:-1], -1, n1), -1, -2)


def from_index(a: Float[Array, "*parts n1 n2"]) -> Float[Array, "*parts n"]:
    """`by_index`'s inverse."""
    return a.reshape(*a.shape[:-2], -1)


def from_frequency(a: Float[Array, "*parts n1 n2"]) -> Float[Array, "*parts n"]:
    """`by_frequency`'s inverse."""
    return jnp.swapaxes(a, -1, -2).reshape(*a.shape[:-2], -1)
