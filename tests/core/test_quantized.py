"""Tests quantized kernels against qwix and the definition of their levels, and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.core import abstract_quantized, bytes_of, dequantize, linear, quantize
from peft_jax.core.quantized import scale_shape, tile_rows

FORMATS = ("int8", "nf4", "w8a8", "w8a8g8")
TILED = ("int8", "nf4")


def random_kernel(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def relative_error(found, expected):
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("quantization", FORMATS)
def test_qwix_dequantizes_our_kernels(quantization, dtype):
    q = quantize(random_kernel((3, 128, 24), dtype), quantization)
    assert q.scale.dtype == dtype
    np.testing.assert_array_equal(dequantize(q), qwix.dequantize(q))


@pytest.mark.parametrize("quantization", TILED)
def test_error_does_not_exceed_that_of_qwix(quantization):
    kernel = random_kernel((128, 64), jnp.bfloat16)
    # qwix relies on implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        theirs = qwix.quantize(
            kernel,
            {"int8": jnp.int8}.get(quantization, quantization),
            channelwise_axes=(1,),
            tiled_axes={0: 64},
        )
    ours = relative_error(dequantize(quantize(kernel, quantization)), kernel)
    assert ours <= 1.001 * relative_error(qwix.dequantize(theirs), kernel)


def test_int8_error_agrees_with_theory():
    """Rounding errors are uniform over a step, of size (the tile's largest magnitude) / 127."""
    kernel = np.asarray(random_kernel((64 * 50, 40)), np.float64)
    q = quantize(jnp.asarray(kernel, jnp.float32), "int8")
    largest = np.abs(kernel.reshape(50, 64, 40)).max(axis=1)
    expected = np.sqrt(np.mean((largest / 127) ** 2) / 12)
    found = np.sqrt(np.mean((np.asarray(dequantize(q), np.float64) - kernel) ** 2))
    assert found == pytest.approx(expected, rel=0.01)


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """Section 3 of the paper, with the authors' outermost quantile, gives appendix E's numbers."""
    outermost = 0.9677083
    upper = scipy.stats.norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    lower = -scipy.stats.norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([upper, [0.0], lower])) / upper.max()
    q = qwix.QArray(jnp.arange(16, dtype=jnp.uint4)[:, None], jnp.ones((1, 1)), None, "nf4")
    np.testing.assert_allclose(dequantize(q)[:, 0], levels, atol=1e-6)


@pytest.mark.parametrize("quantization", FORMATS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_every_weight_is_rounded_to_the_nearest_value(quantization, data):
    d_in = data.draw(st.sampled_from([8, 24, 64, 100, 192]))
    d_out = data.draw(st.sampled_from([1, 5]))  # each shape compiles
    seed = data.draw(st.integers(0, 2**16))
    kernel = np.random.default_rng(seed).normal(size=(d_in, d_out)).astype(np.float32)
    q = jax.jit(quantize, static_argnums=1)(jnp.asarray(kernel), quantization)
    assert q.scale.shape == scale_shape((d_in, d_out), quantization)
    assert q.scale.shape == (d_in // tile_rows(d_in, quantization), d_out)
    scale = np.repeat(np.asarray(q.scale), tile_rows(d_in, quantization), axis=0)
    all_values = (
        np.arange(-127, 128)
        if quantization != "nf4"
        else np.asarray(
            dequantize(
                qwix.QArray(jnp.arange(16, dtype=jnp.uint4)[:, None], jnp.ones((1, 1)), None, "nf4")
            )
        )[:, 0]
    )
    best = np.abs(kernel[..., None] - scale[..., None] * all_values).min(axis=-1)
    found = np.asarray(jax.jit(dequantize)(q))
    np.testing.assert_allclose(np.abs(found - kernel), best, atol=2e-6)


@pytest.mark.parametrize("quantization", FORMATS)
def test_zeros_stay_zeros(quantization):
    q = quantize(jnp.zeros((16, 4)), quantization)
    np.testing.assert_array_equal(dequantize(q), 0.0)


@pytest.mark.parametrize("quantization", TILED)
def test_product_and_gradient_equal_those_of_the_dense_kernel(quantization):
    q = quantize(random_kernel((128, 24)), quantization)
    x = random_kernel((5, 128))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(linear(x, kernel)))

    for found, expected in zip(
        jax.value_and_grad(loss)(x, q), jax.value_and_grad(loss)(x, dequantize(q)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", TILED)
@pytest.mark.parametrize("spec", [("a", "b"), ("b", "a"), (("a", "b"), None), (None, ("b", "a"))])
def test_sharded_kernel_is_dequantized_without_a_gather(quantization, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    kernel = random_kernel((512, 48))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    q = jax.jit(quantize, static_argnums=1)(kernel, quantization)
    sharded = jax.tree.map(lambda a: jax.device_put(a, sharding), q)
    compiled = jax.jit(dequantize, out_shardings=sharding).lower(sharded).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_array_equal(compiled(sharded), dequantize(q))


def test_bytes_of_dense_and_quantized_kernels():
    kernel = jax.ShapeDtypeStruct((4, 256, 64), jnp.bfloat16)
    scales = 4 * 4 * 64 * 2
    assert bytes_of(kernel) == 2 * kernel.size
    assert bytes_of(abstract_quantized(kernel, "int8")) == kernel.size + scales
    assert bytes_of(abstract_quantized(kernel, "nf4")) == kernel.size // 2 + scales
    assert bytes_of(abstract_quantized(kernel, "w8a8")) == kernel.size + 4 * 64 * 2


def test_kernel_without_a_tile_size_is_rejected():
    with pytest.raises(ValueError, match="134 input features"):
        quantize(jnp.zeros((134, 4)), "int8")


def test_unknown_quantization_is_rejected_with_the_nearest():
    with pytest.raises(ValueError, match=r"'nf5'.* 'nf4'"):
        quantize(jnp.zeros((64, 4)), "nf5")
