"""The unitary product and its gradients against dense complex float64 matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.layout import Layout, use_layout
from kernels_pallas.shared_cases import tolerance
from kernels_pallas.unitary import reference, unitary_product
from kernels_pallas.unitary.cases import XLA_CASES, Case

DTYPES = (jnp.float32, jnp.bfloat16)


def single(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def product_and_gradients(case: Case, dtype, **options) -> tuple[list, list]:
    """Returns (y, dx, dphases, dreflections) by the kernel and by the reference."""
    x, g, phases, reflections = case.arrays()

    @jax.jit
    def both(x, g, *parameters):
        y, transpose = jax.vjp(lambda *a: unitary_product(*a, **options), x, *parameters)
        return y, *transpose(g)

    found = both(jnp.asarray(x, dtype), jnp.asarray(g, dtype), *single(phases, reflections))
    expected = [reference.forward(x, phases, reflections)]
    expected += reference.backward(x, g, phases, reflections)
    return list(found), expected


def expect(found: list, expected: list, dtype, n: int) -> None:
    for index, (one, wanted) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == wanted.shape
        # y and dx have the activations' dtype; the parameters' gradients are float32.
        assert one.dtype == (dtype if index < 2 else jnp.float32)
        if wanted.size:
            # Terms of size 1 cancel in a gradient, so its error is relative to 1 at least.
            allowed = 4 * tolerance(one.dtype, n) * max(1.0, np.abs(wanted).max())
            np.testing.assert_allclose(np.asarray(one, np.float64), wanted, atol=allowed, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", XLA_CASES)
def test_value_and_gradients(case, dtype):
    expect(*product_and_gradients(XLA_CASES[case], dtype), dtype, XLA_CASES[case].n)


def test_xla_form_keeps_jax_derivatives():
    """The requested XLA form keeps JAX's own derivatives, forward mode included."""
    case = XLA_CASES["even"]
    found, expected = product_and_gradients(case, jnp.float32, implementation="xla")
    expect(found, expected, jnp.float32, case.n)
    x, g, *parameters = case.arrays()
    product = functools.partial(unitary_product, implementation="xla")
    _, slope = jax.jvp(lambda x: product(x, *single(*parameters)), single(x), single(g))
    mapped = reference.forward(g, *parameters)
    np.testing.assert_allclose(slope, mapped, atol=1e-5)


@pytest.mark.parametrize("case", ["a prime", "even"])
def test_reference_gradients_match_finite_differences(case):
    x, weights, *parameters = XLA_CASES[case].arrays()
    here = [x, *parameters]
    gradients = reference.backward(x, weights, *parameters)
    rng = np.random.default_rng(1)
    for argument in range(3):
        direction = rng.normal(size=here[argument].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(map(np.float64, here))
            moved[argument] = moved[argument] + step * direction
            ends.append(np.sum(reference.forward(*moved) * weights))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradients[argument] * direction), slope, rtol=1e-7)


def test_reference_is_unitary():
    _, _, phases, reflections = Case((), 30).arrays()
    u = reference.dense(phases, reflections)
    np.testing.assert_allclose(u @ u.conj().T, np.eye(30), atol=1e-13)


@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 20), batch=st.lists(st.integers(0, 3), max_size=2))
def test_norms_are_preserved(n, batch):
    x, _, *parameters = Case(tuple(batch), n).arrays()
    found = jax.jit(unitary_product)(*single(x, *parameters))
    assert found.shape == x.shape
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=2e-6
    )


def test_map_is_orthogonal_over_the_reals():
    parameters = Case((), 30).arrays()[2:]
    u = np.asarray(unitary_product(*single(np.eye(60), *parameters)), np.float64)
    np.testing.assert_allclose(u @ u.T, np.eye(60), atol=1e-6)


def test_lengths_of_reflection_vectors_do_not_matter():
    x, _, phases, reflections = Case((4,), 12).arrays()
    one = unitary_product(*single(x, phases, reflections))
    scaled = reflections * np.array([0.01, 50.0])[:, None, None]
    np.testing.assert_allclose(unitary_product(*single(x, phases, scaled)), one, atol=5e-6)


def test_bfloat16_activations_are_computed_in_float32():
    x, _, *parameters = Case((4,), 16).arrays()
    found = unitary_product(jnp.asarray(x, jnp.bfloat16), *single(*parameters))
    exact = unitary_product(*single(x, *parameters))
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_rejects_mismatched_widths():
    with pytest.raises(ValueError, match=r"14 features.*\b12$"):
        unitary_product(jnp.zeros((2, 14)), *single(*Case((), 6).arrays()[2:]))


# Under JAX transformations.


@pytest.fixture(scope="module")
def whole():
    """Returns rows, gradients, parameters, and the product and gradients of the plain call."""
    x, g, *parameters = single(*Case((8, 4), 12).arrays())
    y, transpose = jax.vjp(unitary_product, x, *parameters)
    return x, g, parameters, (y, *transpose(g))


def same(found, expected) -> None:
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-5)


def test_under_vmap_over_rows_and_over_parameters(whole):
    x, g, parameters, expected = whole

    def gradients(x, g, *parameters):
        y, transpose = jax.vjp(unitary_product, x, *parameters)
        return y, *transpose(g)

    y, dx, *summed = jax.jit(jax.vmap(gradients, in_axes=(0, 0, None, None)))(x, g, *parameters)
    same((y, dx, *(jnp.sum(s, axis=0) for s in summed)), expected)
    twice = [jnp.stack([p, -2.0 * p]) for p in parameters]
    found = jax.jit(jax.vmap(gradients, in_axes=(None, None, 0, 0)))(x, g, *twice)
    same([f[0] for f in found], expected)
    same([f[1] for f in found], gradients(x, g, *(-2.0 * p for p in parameters)))


def test_under_scan_and_remat(whole):
    x, g, parameters, _ = whole
    layers = [jnp.stack([p, 0.5 * p, p + 1.0]) for p in parameters]

    def stacked(x, *layers):
        step = jax.checkpoint(lambda x, layer: (unitary_product(x, *layer), None))
        return jax.lax.scan(step, x, layers)[0]

    def unrolled(x, *layers):
        for layer in range(3):
            x = unitary_product(x, *(p[layer] for p in layers))
        return x

    def gradients(function):
        y, transpose = jax.vjp(function, x, *layers)
        return y, *transpose(g)

    same(jax.jit(functools.partial(gradients, stacked))(), gradients(unrolled))


@pytest.mark.parametrize("check_vma", [True, False])
def test_within_shard_map_on_eight_devices(whole, check_vma):
    x, g, parameters, expected = whole
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradients(x, g, *parameters):
        y, transpose = jax.vjp(unitary_product, x, *parameters)
        dx, *summed = transpose(g)
        if not check_vma:
            summed = [jax.lax.psum(s, "rows") for s in summed]
        return y, dx, *summed

    rows, everywhere = jax.P("rows"), jax.P()
    found = jax.jit(
        jax.shard_map(
            gradients,
            mesh=mesh,
            in_specs=(rows, rows, everywhere, everywhere),
            out_specs=(rows, rows, everywhere, everywhere),
            check_vma=check_vma,
        )
    )(x, g, *parameters)
    same(found, expected)


def test_partitioned_by_the_compiler(whole):
    x, g, parameters, expected = whole
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put((x, g), jax.NamedSharding(mesh, jax.P("rows", None, "columns")))

    @jax.jit
    def gradients(x, g, *parameters):
        y, transpose = jax.vjp(unitary_product, x, *parameters)
        return y, *transpose(g)

    same(gradients(*placed, *parameters), expected)


@pytest.mark.parametrize("tokens", [4, 3], ids=["tokens sharded", "tokens replicated"])
def test_sharded_features_are_gathered(tokens):
    """Shards rows over four devices and features over two, as for a second linear map."""
    case = Case((4, tokens), 12)
    x, g, *parameters = single(*case.arrays())
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put((x, g), jax.NamedSharding(mesh, jax.P("rows", None, "columns")))

    def gradients(x, g, *parameters):
        y, transpose = jax.vjp(unitary_product, x, *parameters)
        return y, *transpose(g)

    with jax.set_mesh(mesh), use_layout(Layout(("rows",), ("columns",))):
        text = str(jax.make_jaxpr(gradients)(*placed, *parameters))
        found = jax.jit(gradients)(*placed, *parameters)
    assert "shard_map" in text
    assert f"[1,{tokens // 2 if tokens % 2 == 0 else tokens},24]" in text
    x, g, phases, reflections = case.arrays()
    expected = (
        reference.forward(x, phases, reflections),
        *reference.backward(x, g, phases, reflections),
    )
    same(found, expected)
