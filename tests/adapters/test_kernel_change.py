"""Tests products with kernels that are changed entry by entry, in pieces."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.adapters import AdapterMethod, HiRA, LoRA, SHiRA, kernel_change
from peft_jax.core import AdaptedKernel, dense, linear, quantize

D_IN, D_OUT, TOKENS = 16, 23, 5
METHODS = {"hira": HiRA(rank=3), "shira": SHiRA(rank=2)}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> AdapterMethod:
    return METHODS[request.param]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divides the 23 columns into five pieces of 5, of which the last begins early."""
    monkeypatch.setattr(kernel_change, "MIN_COLUMNS", 5)


def random(index: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(index), shape)


def make_arrays(method: AdapterMethod) -> dict[str, jax.Array]:
    trainable, constant = method.init(jax.random.key(0), (D_IN, D_OUT))
    moved = {name: array + 0.3 * random(9, *array.shape) for name, array in trainable.items()}
    return method.prepare(moved, constant)


BASES = {
    "plain": lambda w: w,
    "nf4": lambda w: quantize(w, "nf4"),
    "w8a8": lambda w: quantize(w, "w8a8"),
    "adapted": lambda w: AdaptedKernel(
        base=w, arrays={"a": random(4, D_IN, 2), "b": random(5, 2, D_OUT)}, method=LoRA(rank=2)
    ),
}


@pytest.mark.fast("hira-plain", "hira-nf4", "shira-plain", "shira-w8a8")
@pytest.mark.parametrize("kind", BASES)
def test_pieces_agree_with_the_merged_kernel(kind, method, small_pieces):
    base, x, arrays = BASES[kind](random(1, D_IN, D_OUT)), random(2, TOKENS, D_IN), None
    arrays = make_arrays(method)
    found = method.project(x, base, arrays)
    if kind == "w8a8":  # Its own product rounds inputs, and the change's does not.
        whole = dense(base)
        expected = linear(x, base) + x @ (method.merge(whole, arrays) - whole)
    else:
        whole = base.method.merge(base.base, base.arrays) if kind == "adapted" else dense(base)
        expected = x @ method.merge(whole, arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.fast("shira")
def test_gradients_of_pieces_agree_with_those_of_the_whole(method, small_pieces):
    w, x, arrays = random(1, D_IN, D_OUT), random(2, TOKENS, D_IN), make_arrays(method)
    train = {name: array for name, array in arrays.items() if array.dtype == jnp.float32}
    weights = random(3, TOKENS, D_OUT)

    def in_pieces(train, x):
        return jnp.sum(weights * method.project(x, w, {**arrays, **train}))

    def whole(train, x):
        return jnp.sum(weights * (x @ method.merge(w, {**arrays, **train})))

    found, expected = (jax.grad(function, (0, 1))(train, x) for function in (in_pieces, whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_step_builds_an_array_of_the_size_of_the_kernel(dtype, method):
    d_in, d_out = 64, 2048
    trainable, constant = method.init(jax.random.key(0), (d_in, d_out))

    def loss(trainable, x, w):
        return jnp.sum(jnp.tanh(method.project(x, w, method.prepare(trainable, constant))))

    x, w = jnp.ones((3, d_in), dtype), jnp.ones((d_in, d_out), dtype)
    traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(trainable, x, w)
    sizes = [size for size in made(traced.jaxpr) if size >= d_in * d_out]
    assert not sizes


def made(jaxpr) -> list[int]:
    """Returns the sizes of the arrays that a program makes, also within its loops."""
    found = []
    for equation in jaxpr.eqns:
        found += [np.prod(out.aval.shape, dtype=int) for out in equation.outvars]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += made(inner)
    return found


def test_small_changes_survive_in_bfloat16():
    method, x = HiRA(rank=1), jnp.ones((1, D_IN), jnp.bfloat16)
    arrays = {"a": jnp.full((D_IN, 1), 1e-2), "b": jnp.full((1, D_OUT), 1e-2)}
    w = (jnp.eye(D_IN, D_OUT) - jnp.eye(D_IN, D_OUT, 1)).astype(jnp.bfloat16)
    # x W is zero in most columns, so that a change of 1e-4 is all that is left.
    arrays["a"] = arrays["a"].at[::2].set(0.0)
    found = method.project(x, w, arrays).astype(jnp.float32)
    expected = np.ones((1, D_IN)) @ np.asarray(method.merge(w, arrays))
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-6)
