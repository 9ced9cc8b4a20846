"""Tests products of 8-bit integers against exact algebra, sharded, and as compiled for TPUs."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from peft_jax.core import abstract_quantized, dequantize, linear, quantize
from peft_jax.core.integer_products import round_tokens
from peft_jax.cost import find_topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def random(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(x, q):
    """The definition in float64: t (X Q) diag(s)."""
    wide = np.asarray(x, np.float64)
    step = np.abs(np.asarray(x, np.float32)).max(axis=-1, keepdims=True) / np.float32(127)
    step = np.where(step == 0, 1, step).astype(np.float64)
    values = np.round(wide / step)
    return values @ np.asarray(q.qvalue, np.float64) * step * np.asarray(q.scale[0], np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_is_that_of_the_rounded_factors(dtype):
    q = quantize(random((300, 24), dtype=dtype), "w8a8")
    x = random((2, 7, 300), 1, dtype)
    found = linear(x, q)
    assert found.dtype == dtype
    bound = {jnp.float32: 1e-6, jnp.bfloat16: 2.0**-8}[dtype]
    expected = exact(x, q)
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= bound * np.abs(expected).max()


@given(
    # Each shape compiles.
    shape=st.sampled_from([(1, 1, 1), (3, 40, 5), (2, 7, 1)]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_the_error_is_that_of_half_a_step(shape, scale, seed):
    tokens, d_in, d_out = shape
    q = quantize(random((d_in, d_out), seed), "w8a8")
    x = scale * random((tokens, d_in), seed + 1)
    values, step = round_tokens(x)
    assert int(jnp.abs(values.astype(jnp.int32)).max()) <= 127
    dense = np.asarray(dequantize(q), np.float64)
    allowed = np.asarray(step, np.float64) / 2 * np.abs(dense).sum(axis=0)
    error = np.abs(np.asarray(linear(x, q), np.float64) - np.asarray(x, np.float64) @ dense)
    assert (error <= 1.001 * allowed + 1e-6 * np.abs(np.asarray(x)).max()).all()


def test_the_gradient_is_that_of_the_dequantized_kernel():
    q = quantize(random((64, 24)), "w8a8")
    x, dy = random((5, 64), 1), random((5, 24), 2)
    (found,) = jax.vjp(lambda x: linear(x, q), x)[1](dy)
    expected = np.asarray(dy, np.float64) @ np.asarray(dequantize(q), np.float64).T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [("a", "b"), ("b", "a"), (("a", "b"), None), (None, ("a", "b"))])
def test_a_sharded_kernel_gives_the_same_product(spec):
    """Sums of integers are exact in any order, so that the products are equal bit for bit."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    q, x = quantize(random((64, 48)), "w8a8"), random((16, 64), 1)
    values = NamedSharding(mesh, PartitionSpec(*spec))
    scales = NamedSharding(mesh, PartitionSpec(None, spec[1]))
    sharded = q.replace(
        qvalue=jax.device_put(q.qvalue, values), scale=jax.device_put(q.scale, scales)
    )
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a")))
    np.testing.assert_array_equal(jax.jit(linear)(rows, sharded), jax.jit(linear)(x, q))


@needs_libtpu
@pytest.mark.parametrize(
    "chip",
    ["v5p:2x2x1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5e:1x1", "v6e:1x1"))],
)
def test_a_tpu_multiplies_integers_forwards_alone(chip):
    device = SingleDeviceSharding(find_topology(chip).devices[0])
    q = abstract_quantized(jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16), "w8a8")
    x = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
    x, q = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), (x, q)
    )
    grad = jax.grad(lambda x, q: linear(x, q).astype(jnp.float32).sum())
    for function, expected in ((linear, {"s32"}), (grad, {"bf16"})):
        text = jax.jit(function).lower(x, q).compile().as_text()
        products = re.findall(r"= (\w+)\[[\d,]+\]\S* convolution\(", text)
        assert {*products} == expected
