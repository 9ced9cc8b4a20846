"""The unitary product against dense complex matrices in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.unitary import unitary_product

compiled = jax.jit(unitary_product)

WIDTHS = [1, 2, 7, 12, 30, 64]
"""Complex features: powers of two, primes, and products of both."""


def random_parts(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-3, 3, (3, n)), rng.normal(size=(2, 2, n))


def dense(phases: np.ndarray, reflections: np.ndarray) -> np.ndarray:
    """U = D₃ R₂ F⁻¹ D₂ R₁ F D₁ [n, n], complex128, acting on columns."""
    n = phases.shape[-1]
    index = np.arange(n)
    fourier = np.exp(-2j * np.pi * np.outer(index, index) / n) / np.sqrt(n)
    d1, d2, d3 = (np.diag(np.exp(1j * phase)) for phase in phases)

    def householder(parts: np.ndarray) -> np.ndarray:
        v = parts[0] + 1j * parts[1]
        return np.eye(n) - 2 * np.outer(v, v.conj()) / np.vdot(v, v).real

    r1, r2 = map(householder, reflections)
    return d3 @ r2 @ fourier.conj().T @ d2 @ r1 @ fourier @ d1


def apply_dense(x: np.ndarray, phases: np.ndarray, reflections: np.ndarray) -> np.ndarray:
    n = phases.shape[-1]
    z = (x[..., :n] + 1j * x[..., n:]) @ dense(phases, reflections).T
    return np.concatenate([z.real, z.imag], axis=-1)


def single(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(array, jnp.float32) for array in arrays]


@pytest.mark.parametrize("n", WIDTHS)
def test_it_is_the_dense_product(n):
    parts = random_parts(n)
    x = np.random.default_rng(1).normal(size=(2, 3, 2 * n))
    found = compiled(*single(x, *parts))
    expected = apply_dense(x, *parts)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 20), batch=st.lists(st.integers(0, 3), max_size=2))
def test_norms_are_preserved(n, batch):
    x = np.random.default_rng(1).normal(size=(*batch, 2 * n))
    found = compiled(*single(x, *random_parts(n)))
    assert found.shape == x.shape
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=2e-6
    )


@pytest.mark.parametrize("n", [12, 30])
def test_the_map_is_orthogonal_over_the_reals(n):
    u = np.asarray(compiled(*single(np.eye(2 * n), *random_parts(n))), np.float64)
    np.testing.assert_allclose(u @ u.T, np.eye(2 * n), atol=1e-6)


def test_the_lengths_of_the_reflections_do_not_matter():
    phases, reflections = random_parts(12)
    x = np.random.default_rng(1).normal(size=(4, 24))
    one = compiled(*single(x, phases, reflections))
    scaled = reflections * np.array([0.01, 50.0])[:, None, None]
    np.testing.assert_allclose(compiled(*single(x, phases, scaled)), one, atol=5e-6)


@pytest.mark.parametrize("n", [7, 12])
def test_gradients_against_finite_differences_in_double_precision(n):
    phases, reflections = random_parts(n)
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(2, 4, 2 * n))

    def total(x: np.ndarray, phases: np.ndarray, reflections: np.ndarray) -> float:
        return np.sum(apply_dense(x, phases, reflections) * weights)

    @functools.partial(jax.jit)
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(unitary_product(*arrays) * jnp.asarray(weights, jnp.float32))

    here = [x, phases, reflections]
    found = gradient(*single(*here))
    for argument in range(3):
        direction = rng.normal(size=here[argument].shape)
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = list(here)
            moved[argument] = here[argument] + sign * step * direction
            ends.append(total(*moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        found_slope = np.sum(np.asarray(found[argument], np.float64) * direction)
        np.testing.assert_allclose(found_slope, slope, rtol=2e-4, atol=1e-3)


def test_half_precision_activations_are_turned_in_single_precision():
    parts = single(*random_parts(16))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 32)), jnp.bfloat16)
    found = unitary_product(x, *parts)
    assert found.dtype == jnp.bfloat16
    exact = unitary_product(x.astype(jnp.float32), *parts)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="6 complex features are 12 real ones; the input has 14"):
        unitary_product(jnp.zeros((2, 14)), *single(*random_parts(6)))
