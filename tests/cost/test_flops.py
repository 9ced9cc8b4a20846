"""Tests operation counts against formulas and the compiler's own count."""

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from peft_jax.cost import count_flops


def flops(function, *shapes) -> float:
    return count_flops(function, *(jnp.zeros(shape) for shape in shapes)).flops


@hypothesis.given(st.lists(st.integers(1, 9), min_size=4, max_size=4))
@hypothesis.settings(deadline=None, max_examples=20)
def test_batched_product_counts_two_operations_per_multiply_add(sizes):
    b, m, k, n = sizes
    assert flops(jnp.matmul, (b, m, k), (b, k, n)) == 2 * b * m * k * n


def test_loop_body_counts_once_per_iteration():
    def product(x, _):
        return x @ x, None

    def nested(x):
        def outer(x, _):
            return jax.lax.scan(product, x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    assert flops(nested, (4, 4)) == 15 * 2 * 4**3
    # JAX traces a for loop with a known trip count as a scan.
    assert flops(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ x, x), (4, 4)) == 7 * 2 * 4**3


def test_loop_with_a_computed_trip_count_is_reported():
    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1.0, lambda x: x @ x, x)

    count = count_flops(until, jnp.zeros((4, 4)))
    assert (count.flops, count.unknown_loops) == (2 * 4**3, 1)


def test_most_expensive_branch_counts():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert flops(either, (4, 4)) == 2 * 2 * 4**3


def test_rematerialization_counts_again():
    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w) @ w)

    def gradient(function):
        return flops(jax.grad(function, argnums=1), (8, 4), (4, 4))

    one = 2 * 8 * 4 * 4
    assert gradient(loss) == 5 * one  # two products forward; backward, w's twice and x's once
    assert gradient(jax.checkpoint(loss)) in (6 * one, 7 * one)


def test_shards_of_all_devices_count():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def product(x, w):
        spec = jax.P("x"), jax.P()
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=spec, out_specs=jax.P("x"))(x, w)

    assert flops(product, (16, 4), (4, 4)) == 2 * 16 * 4 * 4


@pytest.mark.parametrize("size", [8, 40])
def test_decompositions_count_as_in_the_textbook(size):
    """An inverse takes an elimination and two triangular solves: at most 2/3 n³ + 2 n³."""
    found = flops(jnp.linalg.inv, (size, size))
    assert 2 / 3 * size**3 <= found <= 3 * size**3
    assert flops(lambda x: jnp.abs(jnp.fft.fft(x)), (3, 16)) == 5 * 3 * 16 * 4


def test_count_without_loops_agrees_with_the_compiler():
    def layers(x, w):
        for _ in range(3):
            x = jax.nn.relu(x @ w)
        return x

    arguments = jnp.zeros((64, 64)), jnp.zeros((64, 64))
    analysis = jax.jit(layers).lower(*arguments).compile().cost_analysis()
    assert count_flops(layers, *arguments).flops == pytest.approx(analysis["flops"], rel=0.05)
