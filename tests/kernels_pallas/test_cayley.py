"""The Cayley transform against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.cayley import cayley, reference, skew_entries, skew_symmetric

BLOCK_SIZES = [2, 3, 4, 8, 32, 40]
"""The largest block is too large for the unrolled elimination."""

compiled_skew_symmetric = jax.jit(skew_symmetric, static_argnums=1)
compiled_skew_entries = jax.jit(skew_entries)
compiled_cayley = jax.jit(cayley, static_argnums=1)


def random_entries(*shape: int, scale: float = 0.7) -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, scale, shape).astype(np.float32)


def max_orthogonality_error(q: jax.Array) -> float:
    q = np.asarray(q, np.float64)
    return np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(q.shape[-1])).max()


@pytest.mark.fast("2", "3", "8", "32")
@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_blocks_are_orthogonal_and_match_float64(size):
    entries = random_entries(3, 5, size * (size - 1) // 2)
    q = compiled_cayley(entries, size)
    assert q.shape == (3, 5, size, size)
    assert max_orthogonality_error(q) < 1e-6
    np.testing.assert_allclose(q, reference.cayley(entries, size), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        (8, 30.0),
        (64, 30.0),
        *(pytest.param(size, 10.0, marks=pytest.mark.slow) for size in (128, 256)),
    ],
)
def test_large_rotations_stay_orthogonal(size, scale):
    entries = random_entries(4, size * (size - 1) // 2, scale=scale)
    q = compiled_cayley(entries, size)
    assert max_orthogonality_error(q) < 1e-6
    np.testing.assert_allclose(q, reference.cayley(entries, size), atol=5e-5, rtol=0)


def test_under_vmap_scan_and_remat():
    entries = random_entries(3, 5, 6)

    def loss(e: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(cayley(e, 4)))

    wanted = jax.jit(jax.grad(loss))(jnp.asarray(entries))
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(entries)
    remade = jax.jit(jax.grad(jax.checkpoint(loss)))(jnp.asarray(entries))
    scanned = jax.lax.scan(lambda _, e: (None, jax.grad(loss)(e)), None, entries)[1]
    for found in (mapped, remade, scanned):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        (np.ones(5, np.float32), 4, r"\[5\].*\b6\b"),
        (np.ones((3, 7), np.float32), 4, r"\[3, 7\].*\b6\b"),
        (np.ones(0, np.float32), 1, "b at least 2"),
    ],
)
def test_rejects_a_wrong_number_of_entries(entries, size, message):
    with pytest.raises(ValueError, match=message):
        cayley(jnp.asarray(entries), size)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_zero_entries_give_the_identity_exactly(size):
    q = compiled_cayley(np.zeros((3, 5, size * (size - 1) // 2), np.float32), size)
    np.testing.assert_array_equal(q, np.broadcast_to(np.eye(size), q.shape))


@settings(max_examples=5, deadline=None)
@given(size=st.integers(2, 9), stack=st.lists(st.integers(0, 3), max_size=2))
def test_entries_and_blocks_are_inverses(size, stack):
    entries = random_entries(*stack, size * (size - 1) // 2)
    blocks = compiled_skew_symmetric(entries, size)
    np.testing.assert_array_equal(blocks, reference.skew_symmetric(entries, size))
    np.testing.assert_array_equal(compiled_skew_entries(blocks), entries)
    # What PEFT stores may have any symmetric part too.
    rng = np.random.default_rng(1)
    symmetric = rng.integers(-8, 8, blocks.shape).astype(np.float32)
    symmetric = symmetric + np.swapaxes(symmetric, -1, -2)
    np.testing.assert_allclose(compiled_skew_entries(blocks + symmetric), entries, atol=1e-5)


@pytest.mark.parametrize("size", [2, 8, 40])
def test_gradient_matches_float64_finite_differences(size):
    entries = random_entries(2, size * (size - 1) // 2)
    weights = random_entries(2, size, size, scale=1.0)
    gradient = jax.jit(jax.grad(lambda e: jnp.sum(cayley(e, size) * weights)))(entries)
    rng = np.random.default_rng(2)
    for _ in range(4):
        direction = rng.normal(size=entries.shape)
        step = 1e-5
        ends = [
            np.sum(reference.cayley(entries + sign * step * direction, size) * weights)
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4, atol=1e-4)
