"""Arithmetic counted from programs, beside formulas and the compiler's own count."""

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
def test_a_batched_product_takes_two_operations_a_pair(sizes):
    b, m, k, n = sizes
    assert flops(jnp.matmul, (b, m, k), (b, k, n)) == 2 * b * m * k * n


def test_loops_count_as_often_as_they_run():
    def product(x, _):
        return x @ x, None

    def nested(x):
        def outer(x, _):
            return jax.lax.scan(product, x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    assert flops(nested, (4, 4)) == 15 * 2 * 4**3
    # The trip count of a plain for loop is known, and it is a scan.
    assert flops(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ x, x), (4, 4)) == 7 * 2 * 4**3


def test_loops_that_nobody_can_count_are_said_to_be_there():
    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1.0, lambda x: x @ x, x)

    count = count_flops(until, jnp.zeros((4, 4)))
    assert (count.flops, count.unknown_loops) == (2 * 4**3, 1)


def test_of_branches_the_longest_counts():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert flops(either, (4, 4)) == 2 * 2 * 4**3


def test_what_is_computed_again_counts_again():
    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w) @ w)

    def gradient(function):
        return flops(jax.grad(function, argnums=1), (8, 4), (4, 4))

    one = 2 * 8 * 4 * 4
    assert gradient(loss) == 5 * one  # two forwards, and w's gradient twice and x's once
    assert gradient(jax.checkpoint(loss)) in (6 * one, 7 * one)


def test_over_devices_every_part_counts():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def product(x, w):
        spec = jax.P("x"), jax.P()
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=spec, out_specs=jax.P("x"))(x, w)

    assert flops(product, (16, 4), (4, 4)) == 2 * 16 * 4 * 4


@pytest.mark.parametrize("size", [8, 40])
def test_decompositions_are_those_of_the_textbook(size):
    """An inverse is an elimination and two triangular solves: 2/3 n³ + 2 n³ at most."""
    found = flops(jnp.linalg.inv, (size, size))
    assert 2 / 3 * size**3 <= found <= 3 * size**3
    assert flops(lambda x: jnp.abs(jnp.fft.fft(x)), (3, 16)) == 5 * 3 * 16 * 4


def test_it_is_what_the_compiler_counts_where_nothing_loops():
    def layers(x, w):
        for _ in range(3):
            x = jax.nn.relu(x @ w)
        return x

    arguments = jnp.zeros((64, 64)), jnp.zeros((64, 64))
    analysis = jax.jit(layers).lower(*arguments).compile().cost_analysis()
    assert count_flops(layers, *arguments).flops == pytest.approx(analysis["flops"], rel=0.05)
