"""Block-diagonal products against dense ones in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_rotation import block_rotation, butterfly_rotation


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@settings(max_examples=6, deadline=None)
@given(
    batch=st.lists(st.integers(0, 3), max_size=3),
    blocks=st.integers(1, 4),
    size=st.integers(1, 6),
)
def test_it_is_the_block_diagonal_product(batch, blocks, size):
    x, parts = random(*batch, blocks * size), random(blocks, size, size)
    dense = np.zeros((blocks * size, blocks * size))
    for index, part in enumerate(parts):
        at = slice(index * size, (index + 1) * size)
        dense[at, at] = part
    found = jax.jit(block_rotation)(x, parts)
    assert found.shape == x.shape
    np.testing.assert_allclose(found, x.astype(np.float64) @ dense, atol=1e-5)


def test_the_result_has_the_activations_dtype():
    x, parts = jnp.asarray(random(5, 8)), jnp.asarray(random(2, 4, 4))
    exact = block_rotation(x, parts)
    rounded = block_rotation(x.astype(jnp.bfloat16), parts)
    assert rounded.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0 < float(error) < 2**-7


def test_factors_act_from_the_last_to_the_first():
    # Two factors of 2 x 2 blocks over 4 features: the second pairs 0 with 2 and 1 with 3.
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    factors = jnp.asarray([[swap, np.eye(2)], [swap, np.eye(2)]], jnp.float32)
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    # F₁ swaps features 0 and 2, then F₀ swaps 0 and 1.
    np.testing.assert_array_equal(butterfly_rotation(x, factors), [2.0, 3.0, 1.0, 4.0])


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cover 8 features, but the activations have 9"):
        block_rotation(jnp.zeros((2, 9)), jnp.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="cover 8 features, but the activations have 6"):
        butterfly_rotation(jnp.zeros((6,)), jnp.zeros((2, 4, 2, 2)))


def test_orthogonal_blocks_keep_norms_and_are_undone_by_their_transposes():
    parts = jnp.linalg.qr(jnp.asarray(random(4, 8, 8)))[0]
    x = jnp.asarray(random(10, 32))
    turned = block_rotation(x, parts, precision=jax.lax.Precision.HIGHEST)
    norms = (np.linalg.norm(a, axis=-1) for a in (turned, x))
    np.testing.assert_allclose(*norms, rtol=1e-6)
    back = block_rotation(turned, jnp.swapaxes(parts, -1, -2))
    np.testing.assert_allclose(back, x, atol=2e-6)
