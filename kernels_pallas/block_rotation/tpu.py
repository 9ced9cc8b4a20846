"""Rotates blocks on a TPU: activations are read and written once, and nothing is transposed.

Activations [rows, tokens, features] are split into tiles. The matrices that rotate a tile's
features stay on the chip for all tokens. In the backward pass so does the float32 gradient of those
matrices, which is summed over the tokens.
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
from kernels_pallas.target_device import RESERVED_BYTES, SMALLEST_VMEM_BYTES, target_vmem_bytes

GROUP = 16
"""Number of tokens that a TPU's memory groups together for 16-bit numbers."""

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
    """Returns (y,) with y = x blockdiag(blocks).

    Args:
      x: Activations.
      blocks: [n, B, B].
      precision: Precision of the products.
      interpret: Argument of `pallas_call`.
      config: Tile to use instead of the chosen one.

    Raises:
      ValueError: The tile does not fit the chip.
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
    """Returns (dx, dblocks) for the gradient g of y, in one pass; arguments as for `forward`."""
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
    """Returns the columns of a tile that each of its matrices rotates."""
    size = config.matrix
    return [(i, slice(i * size, (i + 1) * size)) for i in range(config.features // size)]


def _inside_columns(x: jax.Array, at: slice, *, d: int, config: RotationConfig) -> jax.Array:
    """Zeroes what a tile holds past the last feature, which is undefined."""
    if d % config.features == 0:
        return x
    first = pl.program_id(0) * config.features + at.start
    column = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(column < d, x, jnp.zeros_like(x))


def _inside_rows(x: jax.Array, *, tokens: int, config: RotationConfig) -> jax.Array:
    """Zeroes what a tile holds past the last token, which is undefined."""
    if tokens % config.tokens == 0:
        return x
    first = pl.program_id(2) * config.tokens
    row = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < tokens, x, jnp.zeros_like(x))


def dot(a: jax.Array, b: jax.Array, product: str, precision: jax.lax.Precision | None) -> jax.Array:
    """Returns the float32 product a b ("ab"), a bᵀ ("abT") or aᵀ b ("aTb") of two matrices."""
    return jax.lax.dot_general(
        a, b, _DIMENSIONS[product], precision=precision, preferred_element_type=jnp.float32
    )


def as_rows(x: Float[Array, "*batch d"]) -> Float[Array, "rows tokens d"]:
    """Reshapes to [rows, tokens, d] with as few rows as possible without moving data.

    Memory holds tokens in groups of eight (sixteen for 16-bit numbers), so only the axes before
    them merge for free. If the tokens of a row fill whole groups, all tokens become one row.
    """
    d = x.shape[-1]
    if x.ndim < 3 or x.shape[-2] % 16 == 0 or x.shape[-2] < 16:
        return x.reshape(1, -1, d)
    return x.reshape(-1, *x.shape[-2:])


def _whole_group(rows: Float[Array, "rows tokens d"]) -> Float[Array, "rows padded d"]:
    """Pads with zeros to one group of tokens if there are fewer.

    The compiler cannot compare the columns of fewer 16-bit rows. Copying so few costs nothing.
    """
    missing = max(GROUP - rows.shape[1], 0)
    return jnp.pad(rows, ((0, 0), (0, missing), (0, 0))) if missing else rows


def _as_given(rows: Float[Array, "rows padded d"], x: jax.Array) -> jax.Array:
    """Reshapes the rows of a result to the shape of the activations `x`."""
    tokens = as_rows(x).shape[1]
    return rows[:, :tokens].reshape(x.shape)


def _params(config: RotationConfig, rows: jax.Array, *, backward: bool) -> pltpu.CompilerParams:
    over_tokens = pltpu.ARBITRARY if backward else pltpu.PARALLEL
    # A tile given by the caller may need more than the compiler's default limit.
    needed = config.vmem_bytes(rows.dtype, backward=backward)
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL, over_tokens, over_tokens),
        vmem_limit_bytes=max(needed + RESERVED_BYTES, SMALLEST_VMEM_BYTES),
    )


def _checked(
    config: RotationConfig | None, rows: jax.Array, blocks: jax.Array, *, backward: bool
) -> RotationConfig:
    """Returns the given or the chosen tile after checking that it fits the chip."""
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
    """Packs the blocks into matrices for whole tiles of features."""
    features = pl.cdiv(rows.shape[2], config.features) * config.features
    return to_matrices(blocks, config.matrix, features, rows.dtype)


def _cost(rows: jax.Array, config: RotationConfig, *, passes: int) -> pl.CostEstimate:
    """Estimates the cost for the compiler's scheduler and its `cost_analysis`.

    Args:
      rows: Activations.
      config: Tile.
      passes: Number of arrays of their size that are moved; there is one product fewer.
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
    """Returns the grid (features outermost), and the specs of activations and matrices."""
    count, tokens, d = rows.shape
    grid = (pl.cdiv(d, config.features), count, pl.cdiv(tokens, config.tokens))
    tile = pl.BlockSpec((1, config.tokens, config.features), lambda f, r, t: (r, t, f))
    size = config.matrix
    matrices = pl.BlockSpec((config.features // size, size, size), lambda f, r, t: (f, 0, 0))
    return grid, tile, matrices


def like(x: jax.Array, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """Returns the shape of a kernel's result that equals and varies over the mesh as `x` does."""
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, manual_axis_type=varying)
