"""Products with a rotated kernel against dense float64 products, and when they are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_rotation import (
    block_rotation,
    prefer_rotated_kernel,
    reference,
    rotated_kernel_product,
)
from kernels_pallas.block_rotation.matrices import to_matrices
from kernels_pallas.cayley import cayley
from kernels_pallas.dispatch import use_implementation
from kernels_pallas.shared_cases import tolerance
from peft_jax.adapters import BOFT

DTYPES = [jnp.float32, jnp.bfloat16]


def draw(batch, blocks, size, columns, dtype):
    """Returns (x, dy, orthogonal blocks, kernel) of a dtype; blocks are float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (*batch, blocks * size), dtype)
    dy = jax.random.normal(keys[1], (*batch, columns), dtype)
    r = jax.random.normal(keys[2], (blocks, size * (size - 1) // 2))
    kernel = jax.random.normal(keys[3], (blocks * size, columns), dtype)
    return x, dy, cayley(r, size), kernel


def expected(x, dy, blocks, kernel):
    """Returns (y, dx, dblocks, dkernel) in float64, with every entry of the blocks free."""
    x, dy, blocks, kernel = (np.asarray(a, np.float64) for a in (x, dy, blocks, kernel))
    rotated = reference.forward(x, blocks)
    dx, dblocks = reference.backward(x, dy @ kernel.T, blocks)
    flat, columns = (a.reshape(-1, a.shape[-1]) for a in (rotated, dy))
    return rotated @ kernel, dx, dblocks, flat.T @ columns


@settings(max_examples=3, deadline=None)
@given(
    batch=st.lists(st.integers(1, 9), max_size=3),
    blocks=st.integers(1, 6),
    size=st.sampled_from([2, 3, 8, 16]),
    columns=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
)
def test_value_and_gradients(batch, blocks, size, columns, dtype):
    x, dy, rotations, kernel = draw(batch, blocks, size, columns, dtype)
    y, transpose = jax.vjp(rotated_kernel_product, x, rotations, kernel)
    found = y, *transpose(dy)
    wanted = expected(x, dy, rotations, kernel)
    assert [a.dtype for a in found] == [dtype, dtype, jnp.float32, dtype]
    lengths = (blocks * size, columns, int(np.prod(batch)) * columns, int(np.prod(batch)))
    names = ("y", "dx", "dblocks", "dkernel")
    for name, one, other, length in zip(names, found, wanted, lengths, strict=True):
        allowed = 2 * tolerance(dtype, max(length, 1)) * np.abs(other).max()
        assert np.abs(np.asarray(one, np.float64) - other).max() <= allowed, name


@pytest.mark.fast("16-16-bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("blocks", "size"), [(16, 16), (64, 2), (20, 16), (3, 128)])
def test_blocks_packed_into_matrices_give_the_same_result(monkeypatch, blocks, size, dtype):
    """On a TPU, blocks that fill matrices of 128 are multiplied in those."""
    x, dy, rotations, kernel = draw((2, 5), blocks, size, 12, dtype)
    module = "kernels_pallas.block_rotation.rotated_kernel"
    monkeypatch.setattr(f"{module}.target_platform", lambda: "tpu")
    packed = []
    monkeypatch.setattr(
        f"{module}.to_matrices", lambda *given: packed.append(given[1]) or to_matrices(*given)
    )
    y, transpose = jax.vjp(rotated_kernel_product, x, rotations, kernel)
    assert set(packed) == ({128} if blocks * size % 128 == 0 else set())
    for found, wanted in zip((y, *transpose(dy)), expected(x, dy, rotations, kernel), strict=True):
        allowed = 2 * tolerance(dtype, blocks * size) * np.abs(wanted).max()
        assert np.abs(np.asarray(found, np.float64) - wanted).max() <= allowed


def test_frozen_kernel_has_no_gradient_product():
    x, _, rotations, kernel = draw((30,), 4, 8, 12, jnp.float32)

    def products(*trainable):
        def loss(x, rotations, kernel):
            return rotated_kernel_product(x, rotations, kernel).sum()

        gradient = jax.make_jaxpr(jax.grad(loss, argnums=trainable))(x, rotations, kernel)
        return str(gradient).count("dot_general")

    assert products(0, 1) < products(0, 1, 2)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_under_transformations(transform):
    x, dy, rotations, kernel = draw((3, 10), 4, 8, 12, jnp.float32)

    def loss(x, rotations):
        return jnp.sum(rotated_kernel_product(x, rotations, kernel) * dy)

    found = jax.grad(transform(loss), argnums=(0, 1))(x, rotations)
    for one, other in zip(found, expected(x, dy, rotations, kernel)[1:3], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_when_a_rotated_kernel_is_preferred():
    x = jnp.ones((4, 10, 16))
    wide, narrow = jnp.ones((16, 41)), jnp.ones((16, 39))
    assert prefer_rotated_kernel(x, narrow)
    assert not prefer_rotated_kernel(x, wide)
    with use_implementation("xla"):
        assert not prefer_rotated_kernel(x, narrow)
    for size in (1, 8):
        mesh = jax.make_mesh((size,), ("data",), devices=jax.devices()[:size])
        with jax.set_mesh(mesh):
            assert prefer_rotated_kernel(x, narrow) == (size == 1)


@pytest.mark.parametrize("columns", [39, 40])
def test_within_shard_map_the_shards_sizes_count(columns):
    """A device has 40 tokens here."""
    preferred = []

    def product(x, kernel):
        preferred.append(prefer_rotated_kernel(x, kernel))
        return x @ kernel

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, kernel = jnp.ones((32, 10, 16)), jnp.ones((16, columns))
    with jax.set_mesh(mesh):
        jax.shard_map(product, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))(
            rows, kernel
        )
    assert preferred == [columns < 40]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [pytest.param(8, marks=pytest.mark.slow), 400])
def test_boft_gives_the_same_result_either_way(columns, kernel_log):
    """Has more tokens than columns, then fewer."""
    method = BOFT(block_size=4, n_butterfly_factors=2)
    x, dy, _, kernel = draw((2, 20), 4, 8, columns, jnp.float32)
    trainable, _ = method.init(jax.random.key(1), kernel.shape)
    r = jax.random.normal(jax.random.key(2), trainable["r"].shape)

    def loss(x, r):
        arrays = method.prepare({**trainable, "r": r}, {})
        return jnp.sum(method.project(x, kernel, arrays) * dy)

    found = jax.value_and_grad(loss, argnums=(0, 1))(x, r)
    with use_implementation("xla"):
        other = jax.value_and_grad(loss, argnums=(0, 1))(x, r)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, other)
    assert any("rotates the kernel" in line for line in kernel_log) == (columns == 8)


def test_rotating_kernel_or_activations_gives_the_same_product():
    x, _, rotations, kernel = draw((6, 5), 4, 8, 12, jnp.float32)
    plain = block_rotation(x, rotations) @ kernel
    np.testing.assert_allclose(rotated_kernel_product(x, rotations, kernel), plain, atol=1e-4)
