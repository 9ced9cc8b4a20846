"""Tests gradient factors against the singular value decomposition of the exact gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_jax.adapters import AdapterSpec, LoRA, gradient_factors
from peft_jax.adapters.factorize import map_matrices, orthonormal
from peft_jax.adapters.gradient_products import (
    LEFT,
    RIGHT,
    add_products,
    random_matrix,
    zero_sums,
)
from peft_jax.adapters.sketch import sites_of
from peft_jax.core import AdaptedKernel, flatten, linear, unflatten
from peft_jax.core.quantized import dequantize, quantize
from peft_jax.models import ExecutionSettings

RANK = 8
SEPARATED = 1.3
"""Minimum ratio of consecutive singular values that count as separated."""


@pytest.fixture(scope="module")
def exact_gradients(loss_fn):
    """Returns a function that sums float64 gradients of (base) kernels over batches."""
    compiled = jax.jit(jax.grad(loss_fn))

    def exact(params, batches, paths):
        total = {}
        for tokens in batches:
            gradient = flatten(compiled(params, tokens))
            for path in paths:
                one = getattr(gradient[path], "base", gradient[path])
                total[path] = total.get(path, 0.0) + np.asarray(one, np.float64)
        return total

    return exact


def sine_of_largest_angle(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the sine of the largest angle between the spans of two orthonormal bases."""
    return np.linalg.norm(one - other @ (other.T @ one), 2)


def check_against_svd(factors, exact, *, angle, value=1e-2) -> int:
    """Asserts that separated leading subspaces agree, and returns their number."""
    compared = 0
    for path, gradient in exact.items():
        found = factors[path]
        stacked = gradient.ndim == 3
        for layer in range(gradient.shape[0]) if stacked else (None,):
            g = gradient if layer is None else gradient[layer]
            u, s, v = (np.asarray(a if layer is None else a[layer], np.float64) for a in found)
            for columns in (u, v):
                np.testing.assert_allclose(columns.T @ columns, np.eye(RANK), atol=1e-5)
            true_u, true_s, true_vt = np.linalg.svd(g)
            np.testing.assert_allclose(s[0], true_s[0], rtol=value)
            for k in range(1, RANK + 1):
                if true_s[k - 1] < SEPARATED * true_s[k]:
                    continue
                np.testing.assert_allclose(s[:k], true_s[:k], rtol=value)
                assert sine_of_largest_angle(u[:, :k], true_u[:, :k]) < angle, (path, layer, k)
                assert sine_of_largest_angle(v[:, :k], true_vt[:k].T) < angle, (path, layer, k)
                compared += 1
    return compared


def kernel_paths(params):
    return [path for path in flatten(params) if path[-1] == "kernel"]


@pytest.mark.slow
def test_leading_subspaces_agree_with_the_exact_gradient(
    llama_params, loss_fn, batches, exact_gradients, key
):
    """Covers every kernel of the model, including the output head, over several batches."""
    paths = kernel_paths(llama_params)
    factors = gradient_factors(
        loss_fn, llama_params, dict.fromkeys(paths, RANK), batches, key, passes=6
    )
    exact = exact_gradients(llama_params, batches, paths)
    compared = check_against_svd(factors, exact, angle=1e-2)
    assert compared > 2 * 15
    # The first batch alone has another gradient.
    first = exact_gradients(llama_params, batches[:1], paths)
    with pytest.raises(AssertionError):
        check_against_svd(factors, first, angle=1e-2)


@pytest.mark.slow
def test_factors_over_a_bfloat16_base(llama_params, loss_fn, batches, exact_gradients, key):
    held = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), llama_params)
    paths = [("layers", "self_attn", "q_proj", "kernel"), ("layers", "mlp", "down_proj", "kernel")]
    factors = gradient_factors(loss_fn, held, dict.fromkeys(paths, RANK), batches, key, passes=6)
    assert factors[paths[0]].u.dtype == jnp.float32
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), held)
    exact = exact_gradients(same, batches, paths)
    assert check_against_svd(factors, exact, angle=1e-2) > 4


@pytest.mark.slow
def test_factors_with_bfloat16_activations(
    llama, llama_params, loss_fn, batches, exact_gradients, key
):
    """The gradient then has 2 or 3 significant digits, and so have its directions."""
    rounded = llama.with_execution(ExecutionSettings(compute_dtype="bfloat16"))

    def rounded_loss(params, tokens):
        log_probabilities = jax.nn.log_softmax(rounded(params, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1))

    paths = [("layers", "mlp", "down_proj", "kernel")]
    factors = gradient_factors(rounded_loss, llama_params, {paths[0]: RANK}, batches, key, passes=6)
    exact = exact_gradients(llama_params, batches, paths)
    assert check_against_svd(factors, exact, angle=0.15, value=5e-2) > 2


@pytest.mark.slow
def test_factors_over_an_adapted_base(llama_params, loss_fn, batches, exact_gradients, key):
    spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj", "up_proj"))
    state = spec.init(key, llama_params)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, state.trainable)
    bound = spec.bind(llama_params, state.replace(trainable=moved))
    paths = [("layers", "self_attn", "q_proj", "kernel"), ("layers", "mlp", "down_proj", "kernel")]
    assert isinstance(flatten(bound)[paths[0]], AdaptedKernel)
    factors = gradient_factors(loss_fn, bound, dict.fromkeys(paths, RANK), batches, key, passes=6)
    exact = exact_gradients(bound, batches, paths)
    assert check_against_svd(factors, exact, angle=1e-2) > 4


def test_products_with_the_gradient_are_exact(llama_params, loss_fn, batches, exact_gradients, key):
    """One backward pass gives G Ω and Ψᵀ G without approximation, summed over batches."""
    paths = [("layers", "self_attn", "k_proj", "kernel"), ("lm_head", "kernel")]
    exact = exact_gradients(llama_params, batches, paths)
    sites = sites_of(llama_params, dict.fromkeys(paths, 2))
    total = zero_sums(sites=sites, sides=(RIGHT, LEFT))
    for batch in batches:
        total = add_products(total, {}, key, llama_params, batch, loss_fn=loss_fn, sites=sites)

    def drawn(site, side, size, width):
        keys = site.keys(key, side)
        if not site.stack:
            return np.asarray(random_matrix(keys, size, width), np.float64)
        return np.stack([np.asarray(random_matrix(k, size, width), np.float64) for k in keys])

    for site in sites:
        g = exact[site.path]
        omega = drawn(site, RIGHT, site.d_out, site.right)
        psi = drawn(site, LEFT, site.d_in, site.left)
        for found, expected in (
            (total[RIGHT][site.path], g @ omega),
            (total[LEFT][site.path], np.swapaxes(psi, -1, -2) @ g),
        ):
            assert found.shape == expected.shape
            # The exact gradient comes from float32 activations too, in another order of sums.
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error < 1e-6, site.path


@pytest.mark.parametrize(("d_in", "d_out"), [(40, 30), (64, 200), (200, 64)])
def test_products_agree_with_float64_to_rounding(d_in, d_out, key):
    """For y = x W with a given dy, G = xᵀ dy is known in float64."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(4, 16, d_in)), rng.normal(size=(4, 16, d_out))
    loss, params, path = tokens_problem(x, dy)
    (site,) = sites_of(params, {path: 4})
    sums = add_products(
        zero_sums(sites=(site,), sides=(RIGHT, LEFT)),
        {},
        key,
        params,
        1.0,
        loss_fn=loss,
        sites=(site,),
    )
    x, dy = (np.asarray(z, np.float32).astype(np.float64).reshape(64, -1) for z in (x, dy))
    g = x.T @ dy
    omega = np.asarray(random_matrix(site.keys(key, RIGHT), d_out, site.right), np.float64)
    psi = np.asarray(random_matrix(site.keys(key, LEFT), d_in, site.left), np.float64)
    for found, expected in ((sums[RIGHT][path], g @ omega), (sums[LEFT][path], psi.T @ g)):
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 3e-7


def test_a_tap_leaves_the_function_and_its_gradient_alone(key):
    """Compares the gradient of what comes before a kernel with that without taps."""
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=(12, 12)), jnp.float32) for _ in range(2))
    params = {"first": {"kernel": first}, "second": {"kernel": second}}
    x = jnp.asarray(rng.normal(size=(5, 12)), jnp.float32)

    def loss(params, batch):
        hidden = jnp.tanh(linear(batch, params["first"]["kernel"]))
        return jnp.sum(jnp.tanh(linear(hidden, params["second"]["kernel"])) ** 2)

    exact = flatten(jax.grad(loss)(params, x))
    ranks = {("first", "kernel"): 12, ("second", "kernel"): 12}
    factors = gradient_factors(loss, params, ranks, [x], key)
    for path, (u, s, v) in factors.items():
        np.testing.assert_allclose(u * s @ v.T, exact[path], atol=1e-4)


def linear_problem(gradient: np.ndarray):
    """Returns a loss whose gradient with respect to its one kernel is `gradient`."""
    target = jnp.asarray(gradient, jnp.float32)

    def loss(params, scale):
        products = linear(jnp.eye(target.shape[0]), params["proj"]["kernel"])
        return scale * jnp.sum(products * target)

    return loss, {"proj": {"kernel": jnp.zeros(target.shape)}}, ("proj", "kernel")


def tokens_problem(x: np.ndarray, dy: np.ndarray):
    """Returns a loss of y = x W whose gradient with respect to y is `dy`."""
    x, dy = (jnp.asarray(z, jnp.float32) for z in (x, dy))

    def loss(params, scale):
        return scale * jnp.sum(linear(x, params["proj"]["kernel"]) * dy)

    shape = (x.shape[-1], dy.shape[-1])
    return loss, {"proj": {"kernel": jnp.zeros(shape)}}, ("proj", "kernel")


def falling(size: tuple[int, int], ratio: float):
    """Returns a matrix with singular values ratioⁱ, and its singular vectors."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, min(size))))[0] for n in size)
    return u * ratio ** np.arange(min(size)) @ v.T, u, v


def test_more_passes_improve_the_directions(key):
    gradient, u, _ = falling((40, 30), 0.8)
    loss, params, path = linear_problem(gradient)
    angles = [
        sine_of_largest_angle(
            np.asarray(
                gradient_factors(
                    loss, params, {path: 2}, [1.0], key, oversampling=6, passes=passes
                )[path].u
            ),
            u[:, :2],
        )
        for passes in (2, 4, 6)
    ]
    assert angles[0] > 2 * angles[1] > 4 * angles[2]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    # Each shape compiles a program, so there are few.
    size=st.sampled_from([(2, 90), (120, 7), (61, 64)]),
    rank=st.sampled_from([1, 12]),
    seed=st.integers(0, 99),
)
def test_one_pass_recovers_what_the_sketch_can_hold(size, rank, seed):
    """A gradient whose rank is at most the sketch's width is recovered to rounding."""
    d_in, d_out = size
    rank = min(rank, d_in, d_out)
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=(d_in, rank)) @ rng.normal(size=(rank, d_out))
    loss, params, path = linear_problem(gradient)
    u, s, v = (
        np.asarray(x, np.float64)
        for x in gradient_factors(loss, params, {path: rank}, [1.0], jax.random.key(seed))[path]
    )
    assert (u.shape, s.shape, v.shape) == ((d_in, rank), (rank,), (d_out, rank))
    for columns in (u, v):
        np.testing.assert_allclose(columns.T @ columns, np.eye(rank), atol=1e-5)
    true_s = np.linalg.svd(gradient, compute_uv=False)
    np.testing.assert_allclose(s, true_s[:rank], atol=1e-5 * true_s[0])
    np.testing.assert_allclose(u * s @ v.T, gradient, atol=2e-5 * true_s[0])


@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
@pytest.mark.parametrize(("ratio", "sine"), [(0.6, 0.005), (0.8, 0.1)])
def test_leading_subspaces_of_one_pass_agree_with_the_svd(size, ratio, sine, key):
    """Expects less exact directions where the singular values fall more slowly."""
    gradient, true_u, true_v = falling(size, ratio)
    loss, params, path = linear_problem(gradient)
    u, s, v = (
        np.asarray(x, np.float64)
        for x in gradient_factors(loss, params, {path: 16}, [1.0], key)[path]
    )
    for k in (4, 8):
        assert sine_of_largest_angle(u[:, :k], true_u[:, :k]) < sine
        assert sine_of_largest_angle(v[:, :k], true_v[:, :k]) < sine
    np.testing.assert_allclose(s[:8], ratio ** np.arange(8), rtol=0.02)


def test_one_pass_on_a_model_agrees_with_the_exact_gradient(
    llama_params, loss_fn, batches, exact_gradients, key
):
    """Singular values of so small a model fall slowly, so that directions are approximate."""
    paths = kernel_paths(llama_params)
    factors = gradient_factors(loss_fn, llama_params, dict.fromkeys(paths, RANK), batches, key)
    exact = exact_gradients(llama_params, batches, paths)
    assert check_against_svd(factors, exact, angle=0.4, value=5e-2) > 2 * 15


def test_one_pass_over_a_quantized_base(llama_params, loss_fn, batches, exact_gradients, key):
    path = ("layers", "mlp", "down_proj", "kernel")
    flat = flatten(llama_params)
    held = quantize(flat[path], "int8")
    params = unflatten(flat | {path: held})
    same = unflatten(flat | {path: dequantize(held)})
    factors = gradient_factors(loss_fn, params, {path: RANK}, batches, key)
    exact = exact_gradients(same, batches, [path])
    assert check_against_svd(factors, exact, angle=0.4, value=5e-2) > 2


@pytest.mark.fast("1")
@pytest.mark.parametrize("passes", [1, 4])
def test_the_backward_pass_is_traced_once(llama_params, loss_fn, batches, key, passes):
    traces = []

    def counted(params, tokens):
        traces.append(tokens.shape)
        return loss_fn(params, tokens)

    path = ("layers", "self_attn", "q_proj", "kernel")
    for seed in range(3):
        gradient_factors(
            counted, llama_params, {path: 2}, batches, jax.random.key(seed), passes=passes
        )
    # The power iteration multiplies from the right at random, and by given matrices from each side.
    assert len(traces) == (1 if passes == 1 else 3)


@pytest.mark.parametrize("passes", [0, 3, True])
def test_impossible_numbers_of_passes_are_rejected(key, passes):
    loss, params, path = linear_problem(np.ones((4, 3)))
    with pytest.raises(ValueError, match="passes "):
        gradient_factors(loss, params, {path: 2}, [1.0], key, passes=passes)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(5, 9, 5), (9, 5, 4), (6, 6, 1), (30, 20, 3)])
def test_sketch_as_wide_as_the_kernel_is_exact(d_in, d_out, rank, key):
    gradient = np.random.default_rng(0).normal(size=(d_in, d_out))
    loss, params, path = linear_problem(gradient)
    u, s, v = gradient_factors(loss, params, {path: rank}, [0.25, 0.75], key, oversampling=20)[path]
    assert (u.shape, s.shape, v.shape) == ((d_in, rank), (rank,), (d_out, rank))
    true_u, true_s, true_vt = np.linalg.svd(gradient)
    np.testing.assert_allclose(s, true_s[:rank], rtol=1e-5)
    expected = true_u[:, :rank] * true_s[:rank] @ true_vt[:rank]
    np.testing.assert_allclose(np.asarray(u * s @ v.T), expected, atol=1e-4)


def test_empty_batches_and_degenerate_gradients_are_rejected(key):
    loss, params, path = linear_problem(np.ones((4, 3)))
    with pytest.raises(ValueError, match="batches "):
        gradient_factors(loss, params, {path: 2}, [], key)
    for scale, size in ((0.0, "0"), (np.nan, "nan")):
        with pytest.raises(ValueError, match=rf"gradient of proj\.kernel .* {size} "):
            gradient_factors(loss, params, {path: 2}, [scale], key)


def test_kernels_of_one_shape_are_factorized_together():
    """A CPU then takes one matrix after another, because batches can deadlock there."""
    arrays = {
        ("layers", "q_proj", "kernel"): [jnp.ones((3, 8, 4))],
        ("layers", "o_proj", "kernel"): [jnp.ones((3, 8, 4))],
        ("layers", "up_proj", "kernel"): [jnp.ones((3, 6, 4))],
        ("lm_head", "kernel"): [jnp.ones((8, 4))],
    }
    stacks = {path: x[0].shape[:-2] for path, x in arrays.items()}

    def bases(arrays):
        return map_matrices(orthonormal, arrays, stacks=stacks, mesh=None)

    found = bases(arrays)
    assert {path: x.shape for path, x in found.items()} == {
        path: x[0].shape for path, x in arrays.items()
    }
    lowered = jax.jit(bases).trace(arrays).lower(lowering_platforms=("cpu",)).as_text()
    calls = re.findall(r"@lapack_sgeqrf_ffi\(.*?-> \(tensor<(\S+)xf32>", lowered)
    assert sorted(calls) == ["6x4", "8x4"]
