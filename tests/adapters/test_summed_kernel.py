"""Tests products with a kernel that a low-rank matrix was added to, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import dispatch
from peft_jax.adapters import Hybrid, LoRA, LoRAFA, LoRAGA
from peft_jax.adapters.summed_kernel import (
    SMALLEST_SCALE,
    prefer_summed_kernel,
    rotated_kernel_sum_product,
    summed_kernel_product,
)
from peft_jax.core import AdaptedKernel, linear

SIZES = st.tuples(
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.integers(1, 4),
    st.sampled_from([2, 3, 4]),
    st.integers(1, 9),
    st.integers(1, 3),
)
"""Rows of x, blocks, their size, outputs, rank."""


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def rotation(blocks: np.ndarray) -> np.ndarray:
    """Returns orthogonal blocks nearest to the given ones, as float64."""
    return np.linalg.qr(blocks)[0]


def dense_of(blocks: np.ndarray) -> np.ndarray:
    n, size, _ = blocks.shape
    dense = np.zeros((n * size, n * size))
    for i, block in enumerate(blocks):
        dense[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
    return dense


def agree(found, wanted) -> None:
    for one, other in zip(jax.tree.leaves(found), wanted, strict=True):
        scale = max(np.abs(other).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=1e-5 * scale, rtol=0)


@settings(max_examples=4)
@given(SIZES, st.integers(0, 99))
def test_low_rank_sum_and_its_gradients(sizes, seed):
    rows, n, size, d_out, rank = sizes
    d_in = n * size
    x, w, a, b, g = numbers(
        seed, (*rows, d_in), (d_in, d_out), (d_in, rank), (rank, d_out), (*rows, d_out)
    )
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, w, a, b)]
    y, pull = jax.vjp(summed_kernel_product, *arrays)
    flat, flat_g = x.reshape(-1, d_in), g.reshape(-1, d_out)
    dkernel = flat.T @ flat_g
    agree(y, [x @ (w + a @ b)])
    agree(
        pull(jnp.asarray(g, jnp.float32)),
        [g @ (w + a @ b).T, dkernel, dkernel @ b.T, a.T @ dkernel],
    )


@settings(max_examples=4)
@given(SIZES, st.integers(0, 99))
def test_rotated_sum_and_its_gradients(sizes, seed):
    rows, n, size, d_out, rank = sizes
    d_in = n * size
    x, blocks, w, scale, a, b, g = numbers(
        seed,
        (*rows, d_in),
        (n, size, size),
        (d_in, d_out),
        (d_out,),
        (d_in, rank),
        (rank, d_out),
        (*rows, d_out),
    )
    blocks, scale = rotation(blocks), np.where(np.abs(scale) < 0.1, 0.1, scale)
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, blocks, w, scale, a, b)]
    y, pull = jax.vjp(rotated_kernel_sum_product, *arrays)
    flat, flat_g = x.reshape(-1, d_in), g.reshape(-1, d_out)
    dense = dense_of(blocks)
    dkernel = flat.T @ flat_g
    drotated = dkernel * scale
    ddense = drotated @ w.T
    dblocks = [ddense[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(n)]
    kernel = dense @ w * scale + a @ b
    agree(y, [x @ kernel])
    agree(
        pull(jnp.asarray(g, jnp.float32)),
        [
            g @ kernel.T,
            np.stack(dblocks),
            dense.T @ drotated,
            ((dense @ w) * dkernel).sum(axis=0),
            dkernel @ b.T,
            a.T @ dkernel,
        ],
    )


def test_factors_of_another_dtype_are_cast():
    x, w, a, b = (jnp.ones(shape) for shape in ((5, 8), (8, 3), (8, 2), (2, 3)))
    y, pull = jax.vjp(summed_kernel_product, x, w, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    np.testing.assert_allclose(y, x @ (w + a @ b))
    assert [gradient.dtype.name for gradient in pull(y)] == ["float32"] * 2 + ["bfloat16"] * 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_scale_of_zero_has_a_gradient(sign):
    x, blocks, w, b, g = numbers(0, (40, 8), (2, 4, 4), (8, 3), (2, 3), (40, 3))
    blocks, a = rotation(blocks), np.zeros((8, 2))
    scale = np.asarray([1.0, sign * 0.0, sign * SMALLEST_SCALE / 9])
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, blocks, w, scale, a, b)]
    y, pull = jax.vjp(rotated_kernel_sum_product, *arrays)
    dscale = pull(jnp.asarray(g, jnp.float32))[3]
    np.testing.assert_allclose(y, x @ dense_of(blocks) @ w * scale, atol=1e-5)
    wanted = (dense_of(blocks) @ w * (x.T @ g)).sum(axis=0)
    np.testing.assert_allclose(dscale, wanted, rtol=1e-4)


METHODS = {
    "lora": LoRA(rank=2),
    "lora_ga": LoRAGA(rank=2),
    "hybrid": Hybrid(rank=2, block_size=4),
    "hybrid from zero": Hybrid(rank=2, block_size=4, gradient_init=False),
}


def start(method, shape):
    """Returns arrays that need no gradient of a model."""
    if not isinstance(method, Hybrid):
        return method.neutral(shape)
    low, low_constant = method.low_rank_method.neutral(shape)
    rotation, _ = method.rotation_method.init(jax.random.key(0), shape)
    return {"low_rank": low, "rotation": rotation}, {"low_rank": low_constant, "rotation": {}}


def bound(method, key, *, d_in: int = 16, d_out: int = 12):
    """Returns a function of x and trainable arrays, and arrays far from their start."""
    kernel = jax.random.normal(key, (d_in, d_out))
    trainable, constant = start(method, (d_in, d_out))
    noise = iter(jax.random.split(key, 16))
    trainable = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(noise), a.shape), trainable)
    constant = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(noise), a.shape), constant)

    def apply(x, trainable):
        arrays = method.prepare(trainable, constant)
        return linear(x, AdaptedKernel(base=kernel, arrays=arrays, method=method))

    return apply, trainable


@pytest.mark.fast("lora", "lora_ga")
@pytest.mark.parametrize("name", METHODS)
def test_methods_agree_with_the_terms_apart(name, key):
    """An implementation that the caller asks for rotates and adds activations."""
    apply, trainable = bound(METHODS[name], key)
    x = jax.random.normal(key, (2, 20, 16))

    def both(x, trainable):
        y, pull = jax.vjp(apply, x, trainable)
        return y, pull(jnp.cos(y))

    def traced() -> str:
        return str(jax.make_jaxpr(lambda *arrays: apply(*arrays))(x, trainable))

    summed, text = both(x, trainable), traced()
    with dispatch.use_implementation("xla"):
        apart, other = both(x, trainable), traced()
    product = rotated_kernel_sum_product if "hybrid" in name else summed_kernel_product
    assert product.__name__ in text
    assert product.__name__ not in other
    for one, two in zip(jax.tree.leaves(summed), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(two).max())


def test_it_is_preferred_where_activations_have_more_numbers():
    kernel = jnp.ones((12, 4))
    assert not prefer_summed_kernel(jnp.ones((3, 12)), kernel)
    assert prefer_summed_kernel(jnp.ones((4, 12)), kernel)
    assert not prefer_summed_kernel(jnp.ones((4, 12), jnp.bfloat16), kernel)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert not prefer_summed_kernel(jnp.ones((4, 12)), kernel)


@pytest.mark.parametrize(
    "method", [LoRAFA(rank=2), LoRA(rank=2, dropout=0.5)], ids=lambda method: method.name
)
def test_other_products_and_dropped_inputs_are_added(method, key):
    assert not method.sums_kernels(key)
