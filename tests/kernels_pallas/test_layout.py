"""Kernels on a mesh: each device runs on its shard and results equal those of one device."""

import functools

import jax
import numpy as np
import pytest

from kernels_pallas.block_rotation import block_rotation, reference
from kernels_pallas.block_rotation.cases import Case
from kernels_pallas.layout import Layout, use_layout

CASE = Case((4, 6), 4, 8)
LAYOUT = Layout(rows=("data", "fsdp"), features=("tensor",))


@pytest.fixture(scope="module")
def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)


@pytest.fixture(scope="module")
def arrays(mesh):
    """Returns x, g and blocks on the mesh, and the product and gradients by the reference."""
    x, g, blocks = CASE.arrays()
    spec = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    placed = jax.device_put(x, spec), jax.device_put(g, spec), blocks
    return placed, (reference.forward(x, blocks), *reference.backward(x, g, blocks))


def run(implementation):
    @jax.jit
    def both(x, g, blocks):
        rotate = functools.partial(block_rotation, implementation=implementation)
        y, transpose = jax.vjp(rotate, x, blocks)
        return y, *transpose(g)

    return both


def check(found, expected):
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-4)


@pytest.mark.parametrize("implementation", ["auto", "interpret"])
def test_runs_on_shards_of_a_known_layout(mesh, arrays, implementation, kernel_log):
    placed, expected = arrays
    with jax.set_mesh(mesh), use_layout(LAYOUT):
        both = run(implementation)
        check(both(*placed), expected)
        text = both.lower(*placed).as_text()
    assert "float32[1, 6, 16]" in kernel_log[0]  # one row and half of the features on each device
    assert "manual" in text


@pytest.mark.parametrize(
    "layout", [None, Layout(), Layout(rows=("tensor",)), Layout(rows=("elsewhere",))]
)
def test_unknown_or_wrong_layout_gives_the_same_results(mesh, arrays, layout):
    placed, expected = arrays
    with jax.set_mesh(mesh), use_layout(layout):
        check(run("auto")(*placed), expected)


def test_arrays_that_the_mesh_does_not_divide_are_not_sharded(mesh):
    case = Case((3, 6), 3, 8)  # three rows over four devices, three blocks over two
    x, g, blocks = case.arrays()
    expected = reference.forward(x, blocks), *reference.backward(x, g, blocks)
    with jax.set_mesh(mesh), use_layout(LAYOUT):
        check(run("auto")(x, g, blocks), expected)
