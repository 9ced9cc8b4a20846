"""Computes the butterfly product on a TPU: activations are read and written once for any factors.

A step holds a tile [tokens, features] with all features that mix, and applies every stage (see
`stages`) on the chip. The backward pass recomputes the stages' inputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import tpu as block_rotation
from kernels_pallas.block_rotation.tpu import as_rows, dot, like
from kernels_pallas.butterfly.config import choose_tokens, vmem_bytes
from kernels_pallas.butterfly.factors import compose_butterfly
from kernels_pallas.butterfly.stages import Stages, composes, split, to_matrices
from kernels_pallas.target_device import RESERVED_BYTES, target_vmem_bytes


def forward(
    x: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    *,
    precision: jax.lax.Precision | None,
    interpret: Any,
) -> tuple[Float[Array, "*batch d"]]:
    """Returns (y,) with y = x F_{m-1} ... F_0.

    Args:
      x: Activations.
      factors: [m, n, b, b].
      precision: Precision of the products.
      interpret: Argument of `pallas_call`.

    Raises:
      ValueError: The features that mix do not fit the chip.
    """
    if not x.size:
        return (x,)
    if composes(factors):
        blocks = compose_butterfly(factors)
        return block_rotation.forward(x, blocks, precision=precision, interpret=interpret)
    rows, stages = as_rows(x), split(factors.shape[-1], factors.shape[0])
    tokens = _tokens(rows, stages, backward=False)
    grid, tile, high, low = _specs(rows, stages, tokens, once=True)
    call = pl.pallas_call(
        functools.partial(_forward_step, stages=stages, precision=precision),
        grid=grid,
        in_specs=[tile, high, low],
        out_specs=tile,
        out_shape=like(rows),
        scratch_shapes=[pltpu.VMEM((2, tokens, stages.features), x.dtype)],
        compiler_params=_params(rows, stages, tokens, backward=False),
        cost_estimate=_cost(rows, stages, passes=2),
        interpret=interpret,
        name="butterfly_rotation",
    )
    return (call(rows, *to_matrices(factors, stages, x.dtype)).reshape(x.shape),)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    *,
    precision: jax.lax.Precision | None,
    interpret: Any,
) -> tuple[Float[Array, "*batch d"], Float[Array, "m n b b"]]:
    """Returns (dx, dfactors) for the gradient g of y, in one pass; arguments as for `forward`."""
    if not x.size:
        return x, jnp.zeros_like(factors)
    if composes(factors):
        blocks, to_factors = jax.vjp(compose_butterfly, factors)
        dx, dblocks = block_rotation.backward(
            x, g, blocks, precision=precision, interpret=interpret
        )
        return dx, *to_factors(dblocks)
    rows, stages = as_rows(x), split(factors.shape[-1], factors.shape[0])
    tokens = _tokens(rows, stages, backward=True)
    grid, tile, high, low = _specs(rows, stages, tokens, once=True)
    _, _, *gradients = _specs(rows, stages, tokens, once=False)
    packed = to_matrices(factors, stages, x.dtype)
    # The gradients of the matrices are float32, so their transpose to the factors is too.
    _, to_factors = jax.vjp(
        lambda f: to_matrices(f, stages, jnp.float32), factors.astype(jnp.float32)
    )
    call = pl.pallas_call(
        functools.partial(
            _backward_step,
            stages=stages,
            tokens=rows.shape[1],
            tile=tokens,
            precision=precision,
        ),
        grid=grid,
        in_specs=[tile, tile, high, low],
        out_specs=[tile, *gradients],
        out_shape=[like(rows), *(like(m, jnp.float32) for m in packed)],
        scratch_shapes=[
            pltpu.VMEM((stages.high + 1, tokens, stages.features), x.dtype),
            pltpu.VMEM((2, tokens, stages.features), x.dtype),
        ],
        compiler_params=_params(rows, stages, tokens, backward=True),
        cost_estimate=_cost(rows, stages, passes=3),
        interpret=interpret,
        name="butterfly_rotation_backward",
    )
    dx, *dmatrices = call(rows, as_rows(g), *packed)
    (dfactors,) = to_factors(tuple(dmatrices))
    return dx.reshape(x.shape), dfactors.astype(factors.dtype)


def _forward_step(
    x_ref: Any,
    high_ref: Any,
    low_ref: Any,
    y_ref: Any,
    passing_ref: Any,
    *,
    stages: Stages,
    precision: jax.lax.Precision | None,
) -> None:
    now = x_ref.at[0]
    for index, level in enumerate(reversed(range(stages.high))):
        after = passing_ref.at[index % 2]
        _apply_level(now, high_ref.at[level], after, level, stages, precision)
        now = after
    for t, at in _tiles(stages):
        y_ref[0, :, at] = dot(now[:, at], low_ref[t], "ab", precision).astype(y_ref.dtype)


def _backward_step(
    x_ref: Any,
    g_ref: Any,
    high_ref: Any,
    low_ref: Any,
    dx_ref: Any,
    dhigh_ref: Any,
    dlow_ref: Any,
    inputs_ref: Any,
    passing_ref: Any,
    *,
    stages: Stages,
    tokens: int,
    tile: int,
    precision: jax.lax.Precision | None,
) -> None:
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        dhigh_ref[...] = jnp.zeros_like(dhigh_ref)
        dlow_ref[...] = jnp.zeros_like(dlow_ref)

    # A tile is undefined past the last token, which must not enter the sums over tokens.
    inside = _inside(x_ref.shape[1:], tokens, tile)
    inputs_ref[0] = inside(x_ref[0])
    passing_ref[0] = inside(g_ref[0])
    levels = list(reversed(range(stages.high)))
    for index, level in enumerate(levels):
        _apply_level(
            inputs_ref.at[index],
            high_ref.at[level],
            inputs_ref.at[index + 1],
            level,
            stages,
            precision,
        )
    g, after = passing_ref.at[0], passing_ref.at[1]
    last = inputs_ref.at[stages.high]
    for t, at in _tiles(stages):
        dlow_ref[t] += dot(last[:, at], g[:, at], "aTb", precision)
        after[:, at] = dot(g[:, at], low_ref[t], "abT", precision).astype(after.dtype)
    for index, level in reversed(list(enumerate(levels))):
        g, after = after, g
        x = inputs_ref.at[index]
        for t, at in _tiles(stages):
            partner, other = _partner(t, level, stages)
            dhigh_ref[level, t, 0] += dot(x[:, at], g[:, at], "aTb", precision)
            dhigh_ref[level, t, 1] += dot(x[:, other], g[:, at], "aTb", precision)
            dx = dot(g[:, at], high_ref[level, t, 0], "abT", precision)
            dx += dot(g[:, other], high_ref[level, partner, 1], "abT", precision)
            after[:, at] = dx.astype(after.dtype)
    dx_ref[0] = after[...]


def _apply_level(
    now: Any, matrices: Any, after: Any, level: int, stages: Stages, precision: Any
) -> None:
    """Applies one high level to a buffer and writes the result to another."""
    for t, at in _tiles(stages):
        _, other = _partner(t, level, stages)
        y = dot(now[:, at], matrices[t, 0], "ab", precision)
        y += dot(now[:, other], matrices[t, 1], "ab", precision)
        after[:, at] = y.astype(after.dtype)


def _tiles(stages: Stages) -> list[tuple[int, slice]]:
    return [(t, _columns(t, stages)) for t in range(stages.tiles)]


def _partner(tile: int, level: int, stages: Stages) -> tuple[int, slice]:
    partner = tile ^ 2**level
    return partner, _columns(partner, stages)


def _columns(tile: int, stages: Stages) -> slice:
    return slice(tile * stages.matrix, (tile + 1) * stages.matrix)


def _inside(shape: tuple[int, int], tokens: int, tile: int) -> Any:
    """Returns a function that zeroes a tile's rows past the last token."""
    if tokens % tile == 0:
        return lambda x: x
    row = pl.program_id(2) * tile + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return lambda x: jnp.where(row < tokens, x, jnp.zeros_like(x))


def _tokens(rows: jax.Array, stages: Stages, *, backward: bool) -> int:
    return choose_tokens(
        stages, rows.shape[1], rows.dtype, backward=backward, vmem=target_vmem_bytes()
    )


def _specs(
    rows: jax.Array, stages: Stages, tokens: int, *, once: bool
) -> tuple[tuple[int, int, int], pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Returns the grid (features outermost), and the specs of activations, high and low matrices.

    With `once`, matrices are not double-buffered, which suits operands that are only read.
    """
    count, length, d = rows.shape
    size = stages.matrix
    mode: dict[str, Any] = {"pipeline_mode": pl.Buffered(1)} if once else {}
    return (
        (d // stages.features, count, pl.cdiv(length, tokens)),
        pl.BlockSpec((1, tokens, stages.features), lambda f, r, t: (r, t, f)),
        pl.BlockSpec(
            (stages.high, stages.tiles, 2, size, size), lambda f, r, t: (0, f, 0, 0, 0), **mode
        ),
        pl.BlockSpec((stages.tiles, size, size), lambda f, r, t: (f, 0, 0), **mode),
    )


def _params(
    rows: jax.Array, stages: Stages, tokens: int, *, backward: bool
) -> pltpu.CompilerParams:
    over_tokens = pltpu.ARBITRARY if backward else pltpu.PARALLEL
    needed = vmem_bytes(stages, tokens, rows.dtype, backward=backward)
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL, over_tokens, over_tokens),
        vmem_limit_bytes=needed + RESERVED_BYTES,
    )


def _cost(rows: jax.Array, stages: Stages, *, passes: int) -> pl.CostEstimate:
    products = (2 * stages.high + 1) * (2 * passes - 3)
    matrices = (2 * stages.high + 1) * rows.shape[2] * stages.matrix
    return pl.CostEstimate(
        flops=2 * products * rows.size * stages.matrix,
        bytes_accessed=passes * rows.size * rows.dtype.itemsize
        + matrices * (rows.dtype.itemsize + 4 * (passes - 2)),
        transcendentals=0,
    )
