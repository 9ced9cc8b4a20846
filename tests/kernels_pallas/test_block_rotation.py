"""Block rotations against dense float64 products: XLA's form and the TPU kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_rotation import block_rotation, reference
from kernels_pallas.block_rotation.cases import CASES, Case
from kernels_pallas.shared_cases import tolerance

IMPLEMENTATIONS = ["auto", "xla", "interpret"]
DTYPES = [jnp.float32, jnp.bfloat16]
HIGHEST = jax.lax.Precision.HIGHEST


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=3)
def value_and_gradients(x, g, blocks, implementation):
    def rotate(x, blocks):
        return block_rotation(x, blocks, implementation=implementation)

    y, transpose = jax.vjp(rotate, x, blocks)
    return y, *transpose(g)


def check(case: Case, dtype, implementation: str) -> None:
    """Compares the product and its gradients with the reference, within the dtype's rounding."""
    x, g, blocks = case.arrays()
    found = value_and_gradients(*(jnp.asarray(a, dtype) for a in (x, g)), blocks, implementation)
    expected = reference.forward(x, blocks), *reference.backward(x, g, blocks)
    tokens = max(int(np.prod(case.batch)), 1)
    # The gradient of float32 blocks is summed in float32 for activations of any dtype. XLA's own
    # derivative then rounds it to the dtype of the activations.
    summed_to = dtype if implementation == "xla" else jnp.float32
    for name, y, wanted, rounded_to, length in zip(
        ("y", "dx", "dblocks"),
        found,
        expected,
        (dtype, dtype, summed_to),
        (case.block_size, case.block_size, tokens),
        strict=True,
    ):
        assert y.shape == wanted.shape, name
        assert y.dtype == (jnp.float32 if name == "dblocks" else dtype), name
        allowed = tolerance(rounded_to, length) * np.abs(wanted).max(initial=0.0)
        error = np.abs(np.asarray(y, np.float64) - wanted).max(initial=0.0)
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("implementation", ["auto", "interpret"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients(case, dtype, implementation):
    check(case, dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=4, deadline=None)
@given(
    batch=st.lists(st.integers(0, 19), max_size=3),
    blocks=st.integers(1, 9),
    size=st.sampled_from([1, 2, 3, 5, 8, 20, 64]),
    dtype=st.sampled_from(DTYPES),
)
def test_value_and_gradients_of_random_shapes(implementation, batch, blocks, size, dtype):
    check(Case(tuple(batch), blocks, size), dtype, implementation)


@pytest.mark.parametrize("argument", [0, 1])
def test_reference_gradients_match_finite_differences(argument):
    case = Case((2, 3), 2, 3)
    x, g, blocks = (a.astype(np.float64) for a in case.arrays())
    gradient = reference.backward(x, g, blocks)[argument]
    direction = np.random.default_rng(1).normal(size=gradient.shape)
    ends = []
    for step in (1e-4, -1e-4):
        moved = [x, blocks]
        moved[argument] = moved[argument] + step * direction
        ends.append(np.sum(reference.forward(*moved) * g))
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-4, np.sum(gradient * direction), rtol=1e-8)


# Under JAX transformations. The arrays are small because the interpreter is slow.

SMALL = Case((4, 6), 3, 8)


@pytest.fixture(scope="module")
def small():
    """Returns (x, g, blocks), and the product and gradients by the reference."""
    x, g, blocks = SMALL.arrays()
    return (x, g, blocks), (reference.forward(x, blocks), *reference.backward(x, g, blocks))


def close(found, expected, atol: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mapped", ["rows", "blocks", "both"])
def test_under_vmap(small, implementation, mapped):
    (x, g, blocks), expected = small
    axes = {"rows": (0, 0, None), "blocks": (None, None, 0), "both": (0, 0, 0)}[mapped]
    given = [x, g, blocks]
    if mapped != "rows":
        given[2] = np.stack([blocks + i for i in range(4)])
    found = jax.vmap(
        functools.partial(value_and_gradients, implementation=implementation), in_axes=axes
    )(*given)
    for index in range(4):
        one = [a[index] if axis == 0 else a for a, axis in zip(given, axes, strict=True)]
        x1, g1, blocks1 = one
        expected = reference.forward(x1, blocks1), *reference.backward(x1, g1, blocks1)
        close([part[index] for part in found], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_scan_and_remat(small, implementation):
    (x, g, blocks), _ = small

    def rotated_twice(x, blocks):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
        def body(carry, _):
            return block_rotation(carry, blocks, implementation=implementation), None

        return jax.lax.scan(body, x, None, length=2)[0]

    y, transpose = jax.jit(lambda *a: jax.vjp(rotated_twice, *a))(x, blocks)
    once = reference.forward(x, blocks)
    back, second = reference.backward(once, g, blocks)
    dx, first = reference.backward(x, back, blocks)
    close((y, *transpose(g)), (reference.forward(once, blocks), dx, first + second), atol=2e-2)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_inside_shard_map(small, implementation):
    """Shards rows over four devices and features over two; blocks are replicated over the rows."""
    (x, g, blocks), expected = small
    blocks = np.concatenate([blocks, blocks + 1])
    x, g = (np.concatenate([a, a], axis=-1) for a in (x, g))
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=auto)
    spec = jax.P("rows", None, "columns")

    def rotate(x, blocks):
        return jax.shard_map(
            functools.partial(block_rotation, implementation=implementation),
            mesh=mesh,
            in_specs=(spec, jax.P("columns")),
            out_specs=spec,
        )(x, blocks)

    @jax.jit
    def run(x, g, blocks):
        y, transpose = jax.vjp(rotate, x, blocks)
        return y, *transpose(g)

    expected = reference.forward(x, blocks), *reference.backward(x, g, blocks)
    close(run(x, g, blocks), expected)


def test_xla_can_be_differentiated_twice(small):
    (x, g, blocks), _ = small
    over = jnp.asarray(blocks)

    def energy(x):
        return jnp.sum(block_rotation(x, over, precision=HIGHEST, implementation="xla") ** 2)

    found = jax.jvp(jax.grad(energy), (x,), (g,))[1]
    rotated = reference.forward(g, blocks)
    np.testing.assert_allclose(found, 2 * rotated @ reference.dense(blocks).T, atol=1e-3)


def test_result_has_the_dtype_of_the_activations():
    x, parts = jnp.asarray(random(5, 8)), jnp.asarray(random(2, 4, 4))
    exact = block_rotation(x, parts)
    rounded = block_rotation(x.astype(jnp.bfloat16), parts)
    assert rounded.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0 < float(error) < 2**-7


def test_rejects_mismatched_widths():
    with pytest.raises(ValueError, match=r"9 features.*\b8$"):
        block_rotation(jnp.zeros((2, 9)), jnp.zeros((2, 4, 4)))


def test_orthogonal_blocks_preserve_norms_and_transposes_invert_them():
    parts = jnp.linalg.qr(jnp.asarray(random(4, 8, 8)))[0]
    x = jnp.asarray(random(10, 32))
    rotated = block_rotation(x, parts, precision=HIGHEST)
    norms = (np.linalg.norm(a, axis=-1) for a in (rotated, x))
    np.testing.assert_allclose(*norms, rtol=1e-6)
    back = block_rotation(rotated, jnp.swapaxes(parts, -1, -2))
    np.testing.assert_allclose(back, x, atol=2e-6)
