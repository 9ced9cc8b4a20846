"""Tests the gradient of a linear map's kernel on one and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.core import linear


def gradient(x, kernel, dy):
    return jax.grad(lambda kernel: jnp.sum(linear(x, kernel) * dy))(kernel)


@pytest.mark.parametrize("axes", [(), ("data", "sequence")], ids=["one device", "eight"])
def test_kernel_gradient_is_reduced_without_a_gather(axes):
    """Rows are sharded along one mesh axis and tokens along another."""
    rng = np.random.default_rng(0)
    x, dy, kernel = (rng.normal(size=shape) for shape in ((4, 16, 8), (4, 16, 6), (8, 6)))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, kernel, dy)]
    expected = np.einsum("bti,bto->io", x, dy)
    if not axes:
        np.testing.assert_allclose(gradient(*arrays), expected, atol=1e-4)
        return
    mesh = jax.make_mesh((2, 4), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = NamedSharding(mesh, PartitionSpec(*axes, None))
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = (sharded, replicated, sharded)
    with jax.set_mesh(mesh):
        jitted = jax.jit(gradient, in_shardings=shardings, out_shardings=replicated)
        compiled = jitted.lower(*arrays).compile()
        placed = [jax.device_put(a, s) for a, s in zip(arrays, shardings, strict=True)]
        np.testing.assert_allclose(compiled(*placed), expected, atol=1e-4)
    assert "all-reduce(" in compiled.as_text()
    assert "all-gather(" not in compiled.as_text()
