"""The rotation on a TPU: one read and one write of the activations, no transposed copy of them.

Activations [rows, tokens, features] are cut into tiles. The matrices that turn a tile's features
stay on the chip while all its tokens pass by; so does, on the way back, the float32 gradient of
those matrices, which the tokens add to.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.block_rotation.config import RotationConfig, choose_config
from kernels_pallas.block_rotation.matrices import from_matrices, to_matrices
from kernels_pallas.chips import RESERVED_BYTES, SMALLEST_VMEM_BYTES, target_vmem_bytes

GROUP = 16
"""Tokens that lie together in a TPU's memory, of numbers of 16 bits."""

_DIMENSIONS = {
    "ab": (((1,), (0,)), ((), ())),
    "abT": (((1,), (1,)), ((), ())),
    "aTb": (((0,), (0,)), ((), ())),
}


def forward(
    x: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None,
    interpret: Any,
    config: RotationConfig | None = None,
) -> tuple[Float[Array, "*batch d"]]:
    """(y,), y = x blockdiag(blocks).

    Args:
      x: activations.
      blocks: [n, B, B].
      precision: of the products.
      interpret: for `pallas_call`.
      config: the tile, instead of the chosen one.

    Raises:
      ValueError: the chip has not room for the tile.
    """
    if not x.size:
        return (x,)
    rows = _whole_group(as_rows(x))
    config = _checked(config, rows, blocks, backward=False)
    grid, tile, matrices = _specs(rows, config)
    call = pl.pallas_call(
        functools.partial(_forward_step, d=x.shape[-1], config=config, precision=precision),
        grid=grid,
        in_specs=[tile, matrices],
        out_specs=tile,
        out_shape=like(rows),
        compiler_params=_params(config, rows, backward=False),
        cost_estimate=_cost(rows, config, passes=2),
        interpret=interpret,
        name="block_rotation",
    )
    y = call(rows, _pack(blocks, rows, config))
    return (_as_given(y, x),)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None,
    interpret: Any,
    config: RotationConfig | None = None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "n B B"]]:
    """(dx, dblocks) for the gradient g of y, in one pass over x and g; arguments as `forward`'s."""
    if not x.size:
        return x, jnp.zeros_like(blocks)
    rows = _whole_group(as_rows(x))
    config = _checked(config, rows, blocks, backward=True)
    grid, tile, matrices = _specs(rows, config)
    packed = _pack(blocks, rows, config)
    call = pl.pallas_call(
        functools.partial(
            _backward_step,
            d=x.shape[-1],
            tokens=rows.shape[1],
            config=config,
            precision=precision,
        ),
        grid=grid,
        in_specs=[tile, tile, matrices],
        out_specs=[tile, matrices],
        out_shape=[like(rows), like(packed, jnp.float32)],
        compiler_params=_params(config, rows, backward=True),
        cost_estimate=_cost(rows, config, passes=3),
        interpret=interpret,
        name="block_rotation_backward",
    )
    dx, dmatrices = call(rows, _whole_group(as_rows(g)), packed)
    n, size, _ = blocks.shape
    return _as_given(dx, x), from_matrices(dmatrices, (n, size, size)).astype(blocks.dtype)


def _forward_step(
    x_ref: Any,
    matrices_ref: Any,
    y_ref: Any,
    *,
    d: int,
    config: RotationConfig,
    precision: jax.lax.Precision | None,
) -> None:
    for index, at in _columns(config):
        x = _inside_columns(x_ref[0, :, at], at, d=d, config=config)
        y_ref[0, :, at] = dot(x, matrices_ref[index], "ab", precision).astype(y_ref.dtype)


def _backward_step(
    x_ref: Any,
    g_ref: Any,
    matrices_ref: Any,
    dx_ref: Any,
    dmatrices_ref: Any,
    *,
    d: int,
    tokens: int,
    config: RotationConfig,
    precision: jax.lax.Precision | None,
) -> None:
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        dmatrices_ref[...] = jnp.zeros_like(dmatrices_ref)

    for index, at in _columns(config):
        x, g = (
            _inside_rows(
                _inside_columns(ref[0, :, at], at, d=d, config=config), tokens=tokens, config=config
            )
            for ref in (x_ref, g_ref)
        )
        dx = dot(g, matrices_ref[index], "abT", precision)
        dx_ref[0, :, at] = dx.astype(dx_ref.dtype)
        dmatrices_ref[index] += dot(x, g, "aTb", precision)


def _columns(config: RotationConfig) -> list[tuple[int, slice]]:
    """The columns of a tile that each of its matrices turns."""
    size = config.matrix
    return [(i, slice(i * size, (i + 1) * size)) for i in range(config.features // size)]


def _inside_columns(x: jax.Array, at: slice, *, d: int, config: RotationConfig) -> jax.Array:
    """Zeros in place of what a tile has beyond the last feature, which may be anything."""
    if d % config.features == 0:
        return x
    first = pl.program_id(0) * config.features + at.start
    column = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(column < d, x, jnp.zeros_like(x))


def _inside_rows(x: jax.Array, *, tokens: int, config: RotationConfig) -> jax.Array:
    """Zeros in place of what a tile has beyond the last token."""
    if tokens % config.tokens == 0:
        return x
    first = pl.program_id(2) * config.tokens
    row = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < tokens, x, jnp.zeros_like(x))


def dot(a: jax.Array, b: jax.Array, product: str, precision: jax.lax.Precision | None) -> jax.Array:
    """The float32 product a b ("ab"), a bᵀ ("abT") or aᵀ b ("aTb") of two matrices on the chip."""
    return jax.lax.dot_general(
        a, b, _DIMENSIONS[product], precision=precision, preferred_element_type=jnp.float32
    )


def as_rows(x: Float[Array, "*batch d"]) -> Float[Array, "rows tokens d"]:
    """[rows, tokens, d] with as few rows as can be had without moving anything.

    In memory tokens come in groups of eight (sixteen of 16 bits), so only axes before those can be
    merged for nothing; where a row's tokens are whole groups, all tokens are one row.
    """
    d = x.shape[-1]
    if x.ndim < 3 or x.shape[-2] % 16 == 0 or x.shape[-2] < 16:
        return x.reshape(1, -1, d)
    return x.reshape(-1, *x.shape[-2:])


def _whole_group(rows: Float[Array, "rows tokens d"]) -> Float[Array, "rows padded d"]:
    """The same, with zeros below where the tokens are not even one group of sixteen.

    The compiler cannot compare the columns of a few 16-bit rows; a copy of so few costs nothing.
    """
    missing = max(GROUP - rows.shape[1], 0)
    return jnp.pad(rows, ((0, 0), (0, missing), (0, 0))) if missing else rows


def _as_given(rows: Float[Array, "rows padded d"], x: jax.Array) -> jax.Array:
    """The rows of a result in the shape of the activations that were given."""
    tokens = as_rows(x).shape[1]
    return rows[:, :tokens].reshape(x.shape)


def _params(config: RotationConfig, rows: jax.Array, *, backward: bool) -> pltpu.CompilerParams:
    over_tokens = pltpu.ARBITRARY if backward else pltpu.PARALLEL
    # A tile given by hand may need more than the compiler allows a kernel unasked.
    needed = config.vmem_bytes(rows.dtype, backward=backward)
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL, over_tokens, over_tokens),
        vmem_limit_bytes=max(needed + RESERVED_BYTES, SMALLEST_VMEM_BYTES),
    )


def _checked(
    config: RotationConfig | None, rows: jax.Array, blocks: jax.Array, *, backward: bool
) -> RotationConfig:
    """The given tile, or the chosen one, if the chip has room for it."""
    config = config or choose_config(
        tokens=rows.shape[1],
        features=rows.shape[2],
        block_size=blocks.shape[-1],
        dtype=rows.dtype,
        backward=backward,
    )
    config.check(rows.dtype, backward=backward, vmem_bytes=target_vmem_bytes())
    return config


def _pack(blocks: jax.Array, rows: jax.Array, config: RotationConfig) -> jax.Array:
    """The blocks as matrices, for whole tiles of features."""
    features = pl.cdiv(rows.shape[2], config.features) * config.features
    return to_matrices(blocks, config.matrix, features, rows.dtype)


def _cost(rows: jax.Array, config: RotationConfig, *, passes: int) -> pl.CostEstimate:
    """For the compiler's schedule and its `cost_analysis`.

    Args:
      rows: the activations.
      config: the tile.
      passes: how many arrays of their size are moved; one product fewer is made.
    """
    matrices = rows.shape[2] * config.matrix * (rows.dtype.itemsize + 4 * (passes - 2))
    return pl.CostEstimate(
        flops=2 * (passes - 1) * rows.size * config.matrix,
        bytes_accessed=passes * rows.size * rows.dtype.itemsize + matrices,
        transcendentals=0,
    )


def _specs(
    rows: jax.Array, config: RotationConfig
) -> tuple[tuple[int, int, int], pl.BlockSpec, pl.BlockSpec]:
    """The grid (features outermost), a tile of activations, and the matrices for its features."""
    count, tokens, d = rows.shape
    grid = (pl.cdiv(d, config.features), count, pl.cdiv(tokens, config.tokens))
    tile = pl.BlockSpec((1, config.tokens, config.features), lambda f, r, t: (r, t, f))
    size = config.matrix
    matrices = pl.BlockSpec((config.features // size, size, size), lambda f, r, t: (f, 0, 0))
    return grid, tile, matrices


def like(x: jax.Array, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """The shape of a result of a kernel that is as `x` is."""
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, manual_axis_type=varying)
