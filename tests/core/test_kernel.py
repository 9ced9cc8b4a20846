"""The gradient of a linear map's kernel, on one device and over several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.core import linear


def gradient(x, kernel, dy):
    return jax.grad(lambda kernel: jnp.sum(linear(x, kernel) * dy))(kernel)


@pytest.mark.parametrize("axes", [(), ("data", "sequence")], ids=["one device", "eight"])
def test_the_gradient_of_a_kernel(axes):
    """Rows cut along one axis of a mesh and tokens along another are summed where they are."""
    rng = np.random.default_rng(0)
    x, dy, kernel = (rng.normal(size=shape) for shape in ((4, 16, 8), (4, 16, 6), (8, 6)))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, kernel, dy)]
    expected = np.einsum("bti,bto->io", x, dy)
    if not axes:
        np.testing.assert_allclose(gradient(*arrays), expected, atol=1e-4)
        return
    mesh = jax.make_mesh((2, 4), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cut = NamedSharding(mesh, PartitionSpec(*axes, None))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        jitted = jax.jit(gradient, in_shardings=(cut, whole, cut), out_shardings=whole)
        compiled = jitted.lower(*arrays).compile()
        placed = [jax.device_put(a, s) for a, s in zip(arrays, (cut, whole, cut), strict=True)]
        np.testing.assert_allclose(compiled(*placed), expected, atol=1e-4)
    assert "all-reduce(" in compiled.as_text()
    assert "all-gather(" not in compiled.as_text()
