"""Butterfly products against dense float64 products: XLA's form and the TPU kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.butterfly import butterfly_rotation, compose_butterfly, reference
from kernels_pallas.butterfly.cases import CASES, Case
from kernels_pallas.butterfly.config import choose_tokens, vmem_bytes
from kernels_pallas.butterfly.stages import split
from kernels_pallas.cayley import cayley
from kernels_pallas.memory_traffic import read_traffic
from kernels_pallas.target_device import MIB, VMEM_BYTES
from kernels_pallas.tpu_compiler import TOPOLOGIES, compile_for

SLOW = {"three high levels, two groups"}
"""Cases that compile slowly."""


@functools.partial(jax.jit, static_argnums=3)
def value_and_gradients(x, g, factors, implementation):
    def rotate(x, factors):
        return butterfly_rotation(x, factors, implementation=implementation)

    y, transpose = jax.vjp(rotate, x, factors)
    return y, *transpose(g)


def check(case: Case, dtype, implementation: str, tolerance: float) -> None:
    x, g, factors = case.arrays()
    rounded = [np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, g)]
    found = value_and_gradients(*(jnp.asarray(a, dtype) for a in rounded), factors, implementation)
    expected = reference.forward(rounded[0], factors), *reference.backward(*rounded, factors)
    for name, y, wanted in zip(("y", "dx", "dfactors"), found, expected, strict=True):
        assert y.shape == wanted.shape, name
        error = np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.fast("small blocks-*", "blocks of no power of two-interpret")
@pytest.mark.parametrize("implementation", ["auto", "interpret"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if name in SLOW else ())
        for name, case in CASES.items()
    ],
    ids=CASES,
)
def test_value_and_gradients(case, implementation):
    check(case, jnp.float32, implementation, 2e-6)


@settings(max_examples=5, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 5), max_size=2),
    block_size=st.sampled_from([2, 4, 6, 64]),
    factors=st.integers(1, 3),
    groups=st.integers(1, 3),
    implementation=st.sampled_from(["auto", "interpret"]),
)
def test_value_and_gradients_of_random_shapes(tokens, block_size, factors, groups, implementation):
    case = Case(tuple(tokens), block_size, factors, groups)
    check(case, jnp.float32, implementation, 2e-6)


@pytest.mark.parametrize("implementation", ["auto", "xla", "interpret"])
def test_half_precision(implementation):
    """Every stage rounds its output to 8 bits."""
    check(CASES["one high level"], jnp.bfloat16, implementation, 2e-2)


@pytest.mark.parametrize("implementation", ["auto", "interpret"])
def test_gradients_of_float32_factors_are_summed_in_float32(implementation):
    """Even with bfloat16 activations, gradients keep more than bfloat16's 8 bits."""
    x, g, factors = CASES["one high level"].arrays()
    x, g = (jnp.asarray(a, jnp.bfloat16) for a in (x, g))
    _, _, dfactors = value_and_gradients(x, g, factors, implementation)
    rounded = dfactors.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(rounded == dfactors)) < 0.1


def test_under_vmap_scan_and_remat():
    x, g, factors = (jnp.asarray(a) for a in Case((3, 2), 8, 3).arrays())

    def loss(x, factors):
        return jnp.sum(butterfly_rotation(x, factors) * g[0])

    wanted = [jax.grad(loss, argnums=(0, 1))(row, factors) for row in x]
    wanted = [jnp.stack(parts) for parts in zip(*wanted, strict=True)]
    gradients = jax.grad(jax.checkpoint(loss), argnums=(0, 1))
    mapped = jax.vmap(gradients, (0, None))(x, factors)
    scanned = jax.lax.scan(lambda _, row: (None, gradients(row, factors)), None, x)[1]
    for found in (mapped, scanned):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_reference_gradients_match_finite_differences():
    case = Case((3,), 4, 3)
    x, g, factors = (a.astype(np.float64) for a in case.arrays())
    dx, dfactors = reference.backward(x, g, factors)
    rng = np.random.default_rng(1)
    for argument, gradient in ((0, dx), (1, dfactors)):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [x, factors]
            moved[argument] = moved[argument] + step * direction
            ends.append(np.sum(reference.forward(*moved) * g))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(slope, np.sum(gradient * direction), rtol=1e-7)


def test_simulated_tpu_finds_no_race_and_no_unwritten_read(simulated_tpu):
    case = Case((21,), 64, 4)
    x, g, factors = case.arrays()
    y, transpose = jax.vjp(butterfly_rotation, jnp.asarray(x), jnp.asarray(factors))
    expected = reference.forward(x, factors), *reference.backward(x, g, factors)
    for found, wanted in zip((y, *transpose(jnp.asarray(g))), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_interpret_runs_the_kernel():
    x, _, factors = CASES["one high level"].arrays()

    def text(implementation: str) -> str:
        return str(
            jax.make_jaxpr(value_and_gradients, static_argnums=3)(x, x, factors, implementation)
        )

    assert text("interpret").count("pallas_call[") == 2
    assert "pallas_call" not in text("auto") + text("xla")


def test_factors_apply_from_last_to_first():
    # Two factors of 2 x 2 blocks over 4 features: the second pairs 0 with 2 and 1 with 3.
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    factors = jnp.asarray([[swap, np.eye(2)], [swap, np.eye(2)]], jnp.float32)
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    # F₁ swaps features 0 and 2, then F₀ swaps 0 and 1.
    np.testing.assert_array_equal(butterfly_rotation(x, factors), [2.0, 3.0, 1.0, 4.0])


def test_rejects_mismatched_widths():
    with pytest.raises(ValueError, match=r"6 features.*\b8$"):
        butterfly_rotation(jnp.zeros((6,)), jnp.zeros((2, 4, 2, 2)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 3, 3), r"\[2, 4, 3, 3\].*even"),
        ((3, 6, 2, 2), r"\[3, 6, 2, 2\].*multiple of 4"),
        ((0, 4, 2, 2), r"\[0, 4, 2, 2\].*m at least 1"),
    ],
)
def test_rejects_invalid_factors(shape, message):
    with pytest.raises(ValueError, match=message):
        butterfly_rotation(jnp.zeros((shape[1] * shape[2],)), jnp.zeros(shape))


def test_falls_back_to_xla_for_unsupported_composed_blocks(tpu, kernel_log):
    x = jax.ShapeDtypeStruct((256, 224), jnp.bfloat16)
    factors = jax.ShapeDtypeStruct((2, 16, 14, 14), jnp.float32)
    assert not tpu.runs_pallas(compile_for("v5e", butterfly_rotation, x, factors))
    assert "on tpu: xla (blocks of 28" in kernel_log[-1]


def product_by_peft(factors: np.ndarray) -> np.ndarray:
    """Returns F_{m-1} ... F_0 [d, d] in float64, built with PEFT's permutation matrices."""
    peft_layer = pytest.importorskip("peft.tuners.boft.layer")
    m, n, b, _ = factors.shape
    d = n * b
    product = np.eye(d)
    for level, blocks in enumerate(factors):
        dense = np.zeros((d, d))
        for block in range(n):
            part = slice(block * b, (block + 1) * b)
            dense[part, part] = blocks[block]
        order = peft_layer.BOFTLayer.block_butterfly_perm(None, d, n // 2**level, b // 2, m - 1)
        permutation = peft_layer.BOFTLayer.perm2mat(None, order).numpy().astype(np.float64)
        product = permutation @ dense @ permutation.T @ product
    return product


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def composed_and_rotated(entries, size, x):
    factors = cayley(entries, size)
    return factors, compose_butterfly(factors), butterfly_rotation(x, factors)


@pytest.mark.parametrize(
    ("m", "n", "b"), [(1, 3, 5), (1, 4, 4), (2, 4, 2), (2, 6, 4), (3, 4, 4), (3, 12, 2), (4, 8, 4)]
)
def test_products_of_factors_match_peft(m, n, b):
    x = normal(6, n * b)
    factors, blocks, rotated = composed_and_rotated(0.7 * normal(m, n, b * (b - 1) // 2), b, x)
    product = product_by_peft(np.asarray(factors, np.float64))
    size = b * 2 ** (m - 1)
    assert blocks.shape == (n * b // size, size, size)
    dense = np.zeros_like(product)
    for index, block in enumerate(np.asarray(blocks)):
        part = slice(index * size, (index + 1) * size)
        dense[part, part] = block
    np.testing.assert_allclose(dense, product, atol=1e-6)
    np.testing.assert_allclose(rotated, x @ product, atol=5e-6)
    blocks = np.asarray(blocks, np.float64)
    error = np.abs(np.swapaxes(blocks, -1, -2) @ blocks - np.eye(size)).max()
    assert error < m * 4 * np.finfo(np.float32).eps * np.sqrt(size)
    # The factors mix all features within a block.
    assert m == 1 or np.count_nonzero(np.abs(product) > 1e-6) == product.shape[0] * size


@pytest.mark.parametrize(
    "chip", [pytest.param(c, marks=pytest.mark.slow) for c in ("v5p", *TOPOLOGIES)]
)
def test_compiles_with_one_read_and_one_write(tpu, chip):
    tokens, d = 8192, 4096
    x = jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16)
    factors = jax.ShapeDtypeStruct((8, d // 8, 8, 8), jnp.float32)  # blocks of 1024 mix

    def backward(x, g, factors):
        return jax.vjp(butterfly_rotation, x, factors)[1](g)

    forwards = compile_for(chip, butterfly_rotation, x, factors)
    backwards = compile_for(chip, backward, x, x, factors)
    least = 2 * tokens * d * 2
    assert tpu.runs_pallas(forwards)
    assert tpu.runs_pallas(backwards)
    # Seven sets of 128 x 128 matrices come on top, whatever the number of tokens.
    assert read_traffic(forwards).total < 1.2 * least
    assert read_traffic(backwards).total < 1.5 * 1.5 * least


def test_rejects_features_that_exceed_the_chip():
    stages = split(8, 10)
    dtype = jnp.dtype(jnp.float32)
    with pytest.raises(ValueError, match=r"4096 features.* MiB .*14\.0 MiB"):
        choose_tokens(stages, 4096, dtype, backward=True, vmem=VMEM_BYTES["v4"])
    tokens = choose_tokens(stages, 4096, dtype, backward=True, vmem=VMEM_BYTES["v6e"])
    assert vmem_bytes(stages, tokens, dtype, backward=True) < VMEM_BYTES["v6e"] - 2 * MIB
