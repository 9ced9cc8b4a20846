"""Tests gradient factors against the singular value decomposition of the exact gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import AdapterSpec, LoRA, gradient_factors
from peft_jax.adapters import sketch as sketch_module
from peft_jax.core import AdaptedKernel, flatten, linear
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


def test_leading_subspaces_agree_with_the_exact_gradient(
    llama_params, loss_fn, batches, exact_gradients, key
):
    """Covers every kernel of the model, including the output head, over several batches."""
    paths = kernel_paths(llama_params)
    factors = gradient_factors(loss_fn, llama_params, dict.fromkeys(paths, RANK), batches, key)
    exact = exact_gradients(llama_params, batches, paths)
    compared = check_against_svd(factors, exact, angle=1e-2)
    assert compared > 2 * 15
    # The first batch alone has another gradient.
    first = exact_gradients(llama_params, batches[:1], paths)
    with pytest.raises(AssertionError):
        check_against_svd(factors, first, angle=1e-2)


def test_factors_over_a_bfloat16_base(llama_params, loss_fn, batches, exact_gradients, key):
    held = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), llama_params)
    paths = [("layers", "self_attn", "q_proj", "kernel"), ("layers", "mlp", "down_proj", "kernel")]
    factors = gradient_factors(loss_fn, held, dict.fromkeys(paths, RANK), batches, key)
    assert factors[paths[0]].u.dtype == jnp.float32
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), held)
    exact = exact_gradients(same, batches, paths)
    assert check_against_svd(factors, exact, angle=1e-2) > 4


def test_factors_with_bfloat16_activations(
    llama, llama_params, loss_fn, batches, exact_gradients, key
):
    """The gradient then has 2 or 3 significant digits, and so have its directions."""
    rounded = llama.with_execution(ExecutionSettings(compute_dtype="bfloat16"))

    def rounded_loss(params, tokens):
        log_probabilities = jax.nn.log_softmax(rounded(params, tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1))

    paths = [("layers", "mlp", "down_proj", "kernel")]
    factors = gradient_factors(rounded_loss, llama_params, {paths[0]: RANK}, batches, key)
    exact = exact_gradients(llama_params, batches, paths)
    assert check_against_svd(factors, exact, angle=0.15, value=5e-2) > 2


def test_factors_over_an_adapted_base(llama_params, loss_fn, batches, exact_gradients, key):
    spec = AdapterSpec(method=LoRA(rank=2), target_modules=("q_proj", "up_proj"))
    state = spec.init(key, llama_params)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, state.trainable)
    bound = spec.bind(llama_params, state.replace(trainable=moved))
    paths = [("layers", "self_attn", "q_proj", "kernel"), ("layers", "mlp", "down_proj", "kernel")]
    assert isinstance(flatten(bound)[paths[0]], AdaptedKernel)
    factors = gradient_factors(loss_fn, bound, dict.fromkeys(paths, RANK), batches, key)
    exact = exact_gradients(bound, batches, paths)
    assert check_against_svd(factors, exact, angle=1e-2) > 4


def test_products_with_the_gradient_are_exact(llama_params, loss_fn, batches, exact_gradients, key):
    """LoRA's backward passes give G P and Gᵀ Q without approximation."""
    paths = [("layers", "self_attn", "k_proj", "kernel"), ("lm_head", "kernel")]
    exact = exact_gradients(llama_params, batches, paths)
    passes = sketch_module._Passes(loss_fn, llama_params, batches)
    rng = np.random.default_rng(0)
    for multiply, side in ((passes.times_gradient, -1), (passes.times_transposed, -2)):
        given = {
            path: rng.normal(size=(*g.shape[:-2], g.shape[side], 5)) for path, g in exact.items()
        }
        found = multiply({path: jnp.asarray(p, jnp.float32) for path, p in given.items()})
        for path, g in exact.items():
            g = g if side == -1 else np.swapaxes(g, -1, -2)
            expected = g @ given[path]
            assert found[path].shape == expected.shape
            error = np.linalg.norm(found[path] - expected) / np.linalg.norm(expected)
            assert error < 1e-5, path


def linear_problem(gradient: np.ndarray):
    """Returns a loss whose gradient with respect to its one kernel is `gradient`."""
    target = jnp.asarray(gradient, jnp.float32)

    def loss(params, scale):
        products = linear(jnp.eye(target.shape[0]), params["proj"]["kernel"])
        return scale * jnp.sum(products * target)

    return loss, {"proj": {"kernel": jnp.zeros(target.shape)}}, ("proj", "kernel")


def test_power_iterations_improve_the_directions(key):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, 30)))[0] for size in (40, 30))
    loss, params, path = linear_problem(u * 0.8 ** np.arange(30) @ v.T)
    angles = [
        sine_of_largest_angle(
            np.asarray(
                gradient_factors(
                    loss,
                    params,
                    {path: 2},
                    [1.0],
                    key,
                    oversampling=6,
                    power_iterations=iterations,
                )[path].u
            ),
            u[:, :2],
        )
        for iterations in (0, 1, 2)
    ]
    assert angles[0] > 2 * angles[1] > 4 * angles[2]


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


def test_matrices_are_factorized_one_at_a_time():
    # Batched factorizations of several kernels can deadlock on a small CPU.
    columns = {("layers", name, "kernel"): jnp.ones((3, 8, 4)) for name in ("up_proj", "down_proj")}

    def ranks(jaxpr) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for equation in jaxpr.eqns:
            for inner in jax.tree.leaves(list(equation.params.values())):
                if hasattr(inner, "jaxpr"):
                    for name, sizes in ranks(inner.jaxpr).items():
                        found.setdefault(name, set()).update(sizes)
            name = equation.primitive.name
            found.setdefault(name, set()).update(v.aval.ndim for v in equation.invars)
        return found

    of_qr = ranks(jax.make_jaxpr(sketch_module._orthonormal)(columns).jaxpr)
    assert of_qr["qr"] == {2}
    projected = {path: jnp.ones((3, 5, 4)) for path in columns}
    taken = dict.fromkeys(columns, 2)
    of_svd = ranks(
        jax.make_jaxpr(lambda q, p: sketch_module._factors(q, p, taken))(columns, projected).jaxpr
    )
    assert of_svd["svd"] == {2}
