"""Tests the number of iterations of loops, counted by hand or by running them."""

import jax
import jax.numpy as jnp
import pytest

from peft_jax.cost.hlo import read_program
from peft_jax.cost.loops import count_runs

LOOP = """HloModule m

%condition (c: ({type}[], f32[8])) -> pred[] {{
  %c = ({type}[], f32[8]) parameter(0)
  %i = {type}[]{{:T(128)}} get-tuple-element(%c), index=0
  %end = {type}[]{{:T(128)}} constant({end})
  ROOT %go = pred[]{{:T(512)}} compare(%i, %end), direction={direction}
}}

%body (b: ({type}[], f32[8])) -> ({type}[], f32[8]) {{
  %b = ({type}[], f32[8]) parameter(0)
  %j = {type}[] get-tuple-element(%b), index=0
  %step = {type}[] constant({step})
  %next = {type}[] {operation}(%j, %step)
  %v = f32[8]{{0}} get-tuple-element(%b), index=1
  ROOT %z = ({type}[], f32[8]) tuple(%next, %v)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %first = {type}[] constant({start})
  %w0 = ({type}[], f32[8]) tuple(%first, %x)
  %w = ({type}[], f32[8]) while(%w0), condition=%condition, body=%body
  ROOT %y = f32[8]{{0}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize(
    ("type_", "start", "end", "step", "operation", "direction", "trips"),
    [
        ("s32", 0, 28, 1, "add", "LT", 28),
        ("u32", 0, 7, 2, "add", "LT", 4),
        ("u32", 0, 8, 2, "add", "NE", 4),
        ("s64", 3, 10, 3, "add", "LE", 3),
        ("s32", 9, 0, 1, "subtract", "GT", 9),
        ("s32", 9, 0, -2, "add", "GE", 5),
        ("u8", 1, 100, 2, "multiply", "LT", 7),
        ("s32", 5, 5, 1, "add", "LT", 0),
    ],
)
def test_counters_of_any_type_step_and_direction(
    type_, start, end, step, operation, direction, trips
):
    text = LOOP.format(
        type=type_, start=start, end=end, step=step, operation=operation, direction=direction
    )
    counts = count_runs(read_program(text))
    assert counts.trips == {"w": trips}
    assert counts.times.get("body", 0) == trips
    assert not counts.unknown


def test_noted_trip_count_is_taken():
    text = LOOP.format(type="s32", start=0, end=9, step=1, operation="add", direction="LT").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    assert count_runs(read_program(text)).trips == {"w": 5}


def test_loop_with_an_end_from_outside_counts_once_and_is_named():
    text = LOOP.format(type="s32", start=0, end=9, step=1, operation="add", direction="LT").replace(
        "%first = s32[] constant(0)", "%first = s32[] parameter(1)"
    )
    counts = count_runs(read_program(text))
    assert counts.unknown == ("w",)
    assert counts.trips == {"w": 1}


def trips_of(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return count_runs(read_program(compiled.as_text()))


def test_nested_loops_multiply():
    def function(x):
        def outer(x, _):
            return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x), x), None

        return jax.lax.scan(outer, x, None, length=7)[0]

    counts = trips_of(function, jnp.ones((64, 64)))
    assert sorted(counts.trips.values()) == [5, 7]
    assert sorted(count for count in counts.times.values() if count > 1)[-1] == 35


@pytest.mark.parametrize("window", [None, 2])
def test_inner_bound_that_depends_on_the_outer_counter(window):
    """A causal row of blocks: block i meets blocks 0 to i, or the last `window` of them."""

    def function(x):
        def outer(x, i):
            first = 0 if window is None else jnp.maximum(i - window + 1, 0)
            return jax.lax.fori_loop(first, i + 1, lambda _, x: jnp.sin(x), x), None

        return jax.lax.scan(outer, x, jnp.arange(8))[0]

    counts = trips_of(function, jnp.ones((64, 64)))
    expected = sum(min(i + 1, window or 8) for i in range(8))
    assert sorted(counts.trips.values()) == sorted([8, expected / 8])
    assert not counts.unknown
