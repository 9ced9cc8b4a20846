"""A rotation and a kernel as one product against dense ones in float64, and when it is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_rotation import (
    block_rotation,
    reference,
    turned_kernel_product,
    turning_the_kernel_pays,
)
from kernels_pallas.cases import tolerance
from kernels_pallas.cayley import cayley
from kernels_pallas.dispatch import using
from peft_jax.adapters import BOFT

DTYPES = [jnp.float32, jnp.bfloat16]


def draw(batch, blocks, size, columns, dtype):
    """(x, dy, orthogonal blocks, kernel) of a dtype, blocks in float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (*batch, blocks * size), dtype)
    dy = jax.random.normal(keys[1], (*batch, columns), dtype)
    r = jax.random.normal(keys[2], (blocks, size * (size - 1) // 2))
    kernel = jax.random.normal(keys[3], (blocks * size, columns), dtype)
    return x, dy, cayley(r, size), kernel


def expected(x, dy, blocks, kernel):
    """(y, dx, dblocks, dkernel) in float64; the gradient to blocks is that of independent ones."""
    x, dy, blocks, kernel = (np.asarray(a, np.float64) for a in (x, dy, blocks, kernel))
    turned = reference.forward(x, blocks)
    dx, dblocks = reference.backward(x, dy @ kernel.T, blocks)
    flat, columns = (a.reshape(-1, a.shape[-1]) for a in (turned, dy))
    return turned @ kernel, dx, dblocks, flat.T @ columns


@settings(max_examples=6, deadline=None)
@given(
    batch=st.lists(st.integers(1, 9), max_size=3),
    blocks=st.integers(1, 6),
    size=st.sampled_from([2, 3, 8, 16]),
    columns=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
)
def test_value_and_gradients(batch, blocks, size, columns, dtype):
    x, dy, turns, kernel = draw(batch, blocks, size, columns, dtype)
    y, transpose = jax.vjp(turned_kernel_product, x, turns, kernel)
    found = y, *transpose(dy)
    wanted = expected(x, dy, turns, kernel)
    assert [a.dtype for a in found] == [dtype, dtype, jnp.float32, dtype]
    lengths = (blocks * size, columns, int(np.prod(batch)) * columns, int(np.prod(batch)))
    names = ("y", "dx", "dblocks", "dkernel")
    for name, one, other, length in zip(names, found, wanted, lengths, strict=True):
        allowed = 2 * tolerance(dtype, max(length, 1)) * np.abs(other).max()
        assert np.abs(np.asarray(one, np.float64) - other).max() <= allowed, name


def test_a_frozen_kernel_costs_no_gradient():
    x, _, turns, kernel = draw((30,), 4, 8, 12, jnp.float32)

    def products(*trained):
        def loss(x, turns, kernel):
            return turned_kernel_product(x, turns, kernel).sum()

        gradient = jax.make_jaxpr(jax.grad(loss, argnums=trained))(x, turns, kernel)
        return str(gradient).count("dot_general")

    assert products(0, 1) < products(0, 1, 2)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_under_transformations(transform):
    x, dy, turns, kernel = draw((3, 10), 4, 8, 12, jnp.float32)

    def loss(x, turns):
        return jnp.sum(turned_kernel_product(x, turns, kernel) * dy)

    found = jax.grad(transform(loss), argnums=(0, 1))(x, turns)
    for one, other in zip(found, expected(x, dy, turns, kernel)[1:3], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_where_it_is_taken():
    x = jnp.ones((4, 10, 16))
    wide, narrow = jnp.ones((16, 41)), jnp.ones((16, 39))
    assert turning_the_kernel_pays(x, narrow)
    assert not turning_the_kernel_pays(x, wide)
    with using("xla"):
        assert not turning_the_kernel_pays(x, narrow)
    for size in (1, 8):
        mesh = jax.make_mesh((size,), ("data",), devices=jax.devices()[:size])
        with jax.set_mesh(mesh):
            assert turning_the_kernel_pays(x, narrow) == (size == 1)


@pytest.mark.parametrize("columns", [8, 400])
def test_boft_is_the_same_with_either(columns, said):
    """More tokens than columns, and fewer."""
    method = BOFT(block_size=4, n_butterfly_factors=2)
    x, dy, _, kernel = draw((2, 20), 4, 8, columns, jnp.float32)
    trainable, _ = method.init(jax.random.key(1), kernel.shape)
    r = jax.random.normal(jax.random.key(2), trainable["r"].shape)

    def loss(x, r):
        arrays = method.prepare({**trainable, "r": r}, {})
        return jnp.sum(method.project(x, kernel, arrays) * dy)

    found = jax.value_and_grad(loss, argnums=(0, 1))(x, r)
    with using("xla"):
        other = jax.value_and_grad(loss, argnums=(0, 1))(x, r)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, other)
    assert any("the kernel is turned" in line for line in said) == (columns == 8)


def test_reordering_activations_changes_nothing():
    x, _, turns, kernel = draw((6, 5), 4, 8, 12, jnp.float32)
    plain = block_rotation(x, turns) @ kernel
    np.testing.assert_allclose(turned_kernel_product(x, turns, kernel), plain, atol=1e-4)
