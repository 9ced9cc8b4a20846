"""Tests the product of outputs with BOFT's scale, whose gradient comes from the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters.boft import scale_outputs


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=str)
def test_gradients_agree_with_float64_even_at_zero(dtype, tolerance, zero):
    rng = np.random.default_rng(0)
    y, g = (jnp.asarray(rng.normal(size=(3, 50, 6)), dtype) for _ in range(2))
    scale = jnp.asarray([1.0, -0.3, zero, 1e-30, 40.0, 0.9], jnp.float32)
    scaled, pull = jax.vjp(scale_outputs, y, scale)
    dy, dscale = pull(g)
    ys, gs, s = (np.asarray(a, np.float64) for a in (y, g, scale))
    assert scaled.dtype == y.dtype
    assert dscale.dtype == scale.dtype
    np.testing.assert_allclose(np.asarray(scaled, np.float64), ys * s, rtol=tolerance, atol=1e-26)
    np.testing.assert_allclose(np.asarray(dy, np.float64), gs * s, rtol=tolerance, atol=1e-26)
    wanted = (gs * ys).sum(axis=(0, 1))
    np.testing.assert_allclose(dscale, wanted, atol=tolerance * np.abs(wanted).max())


def test_the_product_before_the_scale_is_not_kept():
    y, scale = jnp.arange(1.0, 13.0).reshape(3, 4), jnp.full(4, 2.0)
    scaled, pull = jax.vjp(scale_outputs, y, scale)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == y.shape]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], scaled)
