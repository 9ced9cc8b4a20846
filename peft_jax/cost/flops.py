"""Counts the floating-point operations of a program from its jaxpr.

A loop body counts once per iteration. The compilers' own analyses count it only once, but a
training step consists of loops over layers, microbatches and chunks of the loss. The count includes
matrix products, decompositions and Fourier transforms. As is usual, it excludes elementwise
operations.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Floating-point operations of a program.

    Attributes:
      flops: Operations of products, transforms and decompositions; a multiply-add counts as two.
      unknown_loops: Number of loops whose trip count is computed; their bodies count once.
    """

    flops: float
    unknown_loops: int = 0

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(
            flops=self.flops + other.flops, unknown_loops=self.unknown_loops + other.unknown_loops
        )

    def times(self, repetitions: int) -> "FlopCount":
        """Returns the count of a program repeated `repetitions` times."""
        return dataclasses.replace(self, flops=self.flops * repetitions)


def count_flops(function: Callable[..., Any], *arguments: Any) -> FlopCount:
    """Counts a function's operations for arguments of these shapes, over all devices.

    Args:
      function: Function to count.
      *arguments: Arrays, or `jax.ShapeDtypeStruct`s.

    Example:
      >>> import jax.numpy as jnp
      >>> def layers(x, weights):
      ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]
      >>> x, weights = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
      >>> count_flops(layers, x, weights).flops == 5 * 2 * 8 * 16 * 16
      True
    """
    return count_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_jaxpr(jaxpr: Any) -> FlopCount:
    """Counts the operations of a jaxpr."""
    total = FlopCount(flops=0.0)
    for equation in jaxpr.eqns:
        total += _count_equation(equation)
    return total


def _count_equation(equation: Any) -> FlopCount:
    name, params = equation.primitive.name, equation.params
    if name in _FORMULAS:
        return FlopCount(flops=_FORMULAS[name](equation))
    if name == "scan":
        return count_jaxpr(params["jaxpr"].jaxpr).times(params["length"])
    if name == "while":
        body = count_jaxpr(params["body_jaxpr"].jaxpr)
        return body + FlopCount(flops=0.0, unknown_loops=1)
    if name == "cond" and params.get("branches_platforms") is not None:
        # Platforms compute the same in forms of their own; the last branch is that of accelerators.
        return count_jaxpr(params["branches"][-1].jaxpr)
    if name == "cond":
        # Which branch runs is only known at run time, so the most expensive one counts.
        return max(
            (count_jaxpr(branch.jaxpr) for branch in params["branches"]),
            key=lambda count: count.flops,
        )
    if name == "kernels_pallas":
        # Counts the plain XLA form, whatever the kernel is lowered to.
        plain = functools.partial(params["operation"].xla, **dict(params["settings"]))
        # Keeps only shape and dtype, because inside `shard_map` operands also carry its mesh.
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
        return count_flops(plain, *shapes)
    if name == "custom_linear_solve":
        # The equation's other jaxprs are only for derivatives.
        return count_jaxpr(params["jaxprs"].solve.jaxpr)
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        return count_jaxpr(params["jaxpr"]).times(math.prod(grid))
    if name == "shard_map":
        axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
        devices = math.prod(params["mesh"].shape[axis] for axis in axes)
        return count_jaxpr(params["jaxpr"]).times(devices)
    inner = FlopCount(flops=0.0)
    for jaxpr in _inner_jaxprs(params):
        inner += count_jaxpr(jaxpr)
    return inner


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs that an equation calls: of `jit`, `checkpoint` or a custom gradient."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "jaxpr") and hasattr(one.jaxpr, "eqns"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one


def _dot_general(equation: Any) -> float:
    """Counts two operations per multiply-add: 2 x result size x contracted size."""
    (contracting, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    summed = math.prod(left[axis] for axis in contracting)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed


def _ragged_dot(equation: Any) -> float:
    """Counts two operations per multiply-add of a row with its own group's kernel."""
    rows, other = (variable.aval.shape for variable in equation.invars[:2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    if tuple(contracting) == tuple(numbers.lhs_ragged_dimensions):
        return 2.0 * math.prod(rows) * other[-1]
    return 2.0 * rows[0] * math.prod(other[1:])


def _fft(equation: Any) -> float:
    """Counts 5 n log2 n for a complex transform of length n, as the textbook algorithm takes."""
    n = math.prod(equation.params["fft_lengths"])
    return 5.0 * math.prod(equation.invars[0].aval.shape) * math.log2(max(n, 2))


def _lu(equation: Any) -> float:
    *stack, rows, columns = equation.invars[0].aval.shape
    return 2.0 / 3.0 * math.prod(stack) * rows * columns * min(rows, columns)


def _triangular_solve(equation: Any) -> float:
    size = equation.invars[0].aval.shape[-1]
    return float(math.prod(equation.invars[1].aval.shape) * size)


def _cholesky(equation: Any) -> float:
    *stack, size, _ = equation.invars[0].aval.shape
    return math.prod(stack) * size**3 / 3.0


_FORMULAS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "fft": _fft,
    "lu": _lu,
    "triangular_solve": _triangular_solve,
    "cholesky": _cholesky,
}
