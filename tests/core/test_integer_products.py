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


def rounded(x):
    """Rounded rows and their steps, in float64."""
    step = np.abs(np.asarray(x, np.float32)).max(axis=-1, keepdims=True) / np.float32(127)
    step = np.where(step == 0, 1, step).astype(np.float64)
    return np.round(np.asarray(x, np.float64) / step), step


def exact(x, q):
    """The definition in float64: t (X Q) diag(s)."""
    values, step = rounded(x)
    return values @ np.asarray(q.qvalue, np.float64) * step * np.asarray(q.scale[0], np.float64)


def exact_gradient(dy, q):
    """The definition in float64: u (Y Qᵀ) with dy diag(s) ≈ u Y."""
    values, step = rounded(np.asarray(dy, np.float32) * np.asarray(q.scale[0], np.float32))
    return values @ np.asarray(q.qvalue, np.float64).T * step


def gradient(x, q, dy):
    return jax.vjp(lambda x: linear(x, q), x)[1](dy)[0]


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
    found = gradient(x, q, dy)
    expected = np.asarray(dy, np.float64) @ np.asarray(dequantize(q), np.float64).T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_rounded_gradient_is_that_of_the_rounded_factors(dtype):
    q = quantize(random((64, 300), dtype=dtype), "w8a8g8")
    # Columns of very different scales, and a token without a gradient.
    q = q.replace(scale=q.scale * jnp.asarray(np.geomspace(1e-3, 10, 300), dtype))
    x, dy = random((2, 7, 64), 1, dtype), random((2, 7, 300), 2, dtype).at[0, 3].set(0)
    np.testing.assert_array_equal(linear(x, q), linear(x, q.replace(qtype="w8a8")))
    found = gradient(x, q, dy)
    assert found.dtype == dtype
    bound = {jnp.float32: 1e-6, jnp.bfloat16: 2.0**-8}[dtype]
    expected = exact_gradient(dy, q)
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= bound * np.abs(expected).max()
    # Each entry of dy diag(s) is at most half a step from its rounded value.
    scaled = np.asarray(dy, np.float64) * np.asarray(q.scale[0], np.float64)
    integers = np.asarray(q.qvalue, np.float64)
    allowed = rounded(scaled)[1] / 2 * np.abs(integers).sum(axis=1)
    error = np.abs(expected - scaled @ integers.T)
    assert (error <= 1.001 * allowed + 1e-6 * np.abs(expected).max()).all()


def test_the_rounded_gradient_passes_a_scan_with_rematerialization():
    q = quantize(random((3, 24, 24)), "w8a8g8")
    x = random((5, 24), 1)

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(lambda x, q: (linear(x, q), None)), x, q)[0]

    y, pull_back = jax.jit(lambda x: jax.vjp(scanned, x))(x)
    states = [x]
    for layer in range(3):
        states.append(exact(states[-1], jax.tree.map(lambda leaf, at=layer: leaf[at], q)))
    np.testing.assert_allclose(y, states[-1], rtol=1e-4)
    expected = random((5, 24), 2)
    (found,) = pull_back(expected)
    for layer in (2, 1, 0):
        expected = exact_gradient(expected, jax.tree.map(lambda leaf, at=layer: leaf[at], q))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("spec", [("a", "b"), ("b", "a"), (("a", "b"), None), (None, ("a", "b"))])
def test_a_sharded_kernel_gives_the_same_product(spec):
    """Sums of integers are exact in any order, so that the products are equal bit for bit."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    q, x, dy = quantize(random((64, 48)), "w8a8g8"), random((16, 64), 1), random((16, 48), 2)
    values = NamedSharding(mesh, PartitionSpec(*spec))
    scales = NamedSharding(mesh, PartitionSpec(None, spec[1]))
    sharded = q.replace(
        qvalue=jax.device_put(q.qvalue, values), scale=jax.device_put(q.scale, scales)
    )
    rows, drows = (jax.device_put(one, NamedSharding(mesh, PartitionSpec("a"))) for one in (x, dy))
    np.testing.assert_array_equal(jax.jit(linear)(rows, sharded), jax.jit(linear)(x, q))
    of_shards = jax.jit(gradient)(rows, sharded, drows)
    np.testing.assert_array_equal(of_shards, jax.jit(gradient)(x, q, dy))


@needs_libtpu
@pytest.mark.parametrize(
    "chip",
    ["v5p:2x2x1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5e:1x1", "v6e:1x1"))],
)
def test_a_tpu_multiplies_integers(chip):
    def read(quantization):
        """Returns dtypes of the gradient's products, and of arrays of the kernel's shape."""
        q = abstract_quantized(jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16), quantization)
        x, dy = (jax.ShapeDtypeStruct((512, width), jnp.bfloat16) for width in (1024, 2048))
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), (x, q, dy)
        )
        text = jax.jit(both).lower(*arguments).compile().as_text()
        products = re.findall(r"= (\w+)\[[\d,]+\]\S* convolution\(", text)
        return sorted(products), {*re.findall(r"(\w+)\[1024,2048\]", text)}

    def both(x, q, dy):
        y, pull_back = jax.vjp(lambda x: linear(x, q), x)
        return y, pull_back(dy)

    device = SingleDeviceSharding(find_topology(chip).devices[0])
    products, kernels = read("w8a8")
    assert products == ["bf16", "s32"]
    assert "bf16" in kernels
    assert read("w8a8g8") == (["s32", "s32"], {"s8"})
