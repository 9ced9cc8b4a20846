"""The unitary product on a TPU, where a block of rows stays on the chip from its read to its write.

A block is read as it lies in memory, rows by features. It is copied to a scratch buffer that holds
one row's pieces of 128 numbers one below another. There the whole map is applied to a few rows at a
time, and the result is copied back. The inverse transform is F⁻¹ z = conj(F conj(z)), and
conjugation is a sign, so the same two matrices serve both directions.

The backward pass does the same with the gradient, from the last factor to the first. It recomputes
the inputs of the factors from x, and sums the gradients of the parameters on the chip.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.target_device import RESERVED_BYTES, target_vmem_bytes
from kernels_pallas.unitary import fourier
from kernels_pallas.unitary.config import (
    GRADIENT_TABLES,
    LANES,
    UnitaryConfig,
    choose_config,
    resolve_precision,
)

Complex = tuple[jax.Array, jax.Array]
"""Real and imaginary parts [rows at once, padded n₁, 128], float32."""

D1, V1, D2, V2, D3 = range(5)
"""Indices of the parameter tables, in the order of the factors."""


def forward(
    x: Float[Array, "*batch d"],
    phases: Float[Array, "3 n"],
    reflections: Float[Array, "2 2 n"],
    *,
    precision: jax.lax.Precision | None,
    interpret: Any,
    config: UnitaryConfig | None = None,
) -> tuple[Float[Array, "*batch d"]]:
    """Returns (y,) with y = U x.

    Args:
      x: Activations.
      phases: [3, n].
      reflections: [2, 2, n].
      precision: Precision of the transforms.
      interpret: Argument of `pallas_call`.
      config: Size of a step to use instead of the chosen one.

    Raises:
      ValueError: The configuration does not fit the chip.
    """
    if not x.size:
        return (x,)
    rows = x.reshape(-1, x.shape[-1])
    precision = resolve_precision(precision, x.dtype)
    config = _checked(config, rows, precision, backward=False)
    constants = _constants(_tables(phases, reflections, config), config, precision)
    block = pl.BlockSpec((config.rows, rows.shape[1]), lambda i: (i, 0))
    incoming = _incoming(block, config)
    call = pl.pallas_call(
        functools.partial(_forward_step, total=rows.shape[0], config=config),
        grid=(pl.cdiv(rows.shape[0], config.rows),),
        in_specs=[incoming, *map(_whole, constants)],
        out_specs=block,
        out_shape=_like(rows, rows.shape),
        scratch_shapes=[_scratch(config)],
        compiler_params=_compiler_params(("parallel",), config, x.dtype, precision, backward=False),
        cost_estimate=_cost(rows, constants, config, backward=False),
        interpret=interpret,
        name="unitary_product",
    )
    return (call(rows, *constants).reshape(x.shape),)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    phases: Float[Array, "3 n"],
    reflections: Float[Array, "2 2 n"],
    *,
    precision: jax.lax.Precision | None,
    interpret: Any,
    config: UnitaryConfig | None = None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "3 n"], Float[Array, "2 2 n"]]:
    """Returns (dx, dphases, dreflections) for the gradient g of y, in one pass over x and g."""
    if not x.size:
        return x, jnp.zeros_like(phases), jnp.zeros_like(reflections)
    rows = x.reshape(-1, x.shape[-1])
    precision = resolve_precision(precision, x.dtype)
    config = _checked(config, rows, precision, backward=True)
    constants = _constants(_tables(phases, reflections, config), config, precision)
    steps = pl.cdiv(rows.shape[0], config.rows)
    # Chips with two cores split the first axis of the grid, and each core has its own sums.
    cores = 2 if steps % 2 == 0 else 1
    steps //= cores
    block = pl.BlockSpec((config.rows, rows.shape[1]), lambda core, i: (core * steps + i, 0))
    incoming = _incoming(block, config)
    sums = (GRADIENT_TABLES, config.padded, LANES)
    call = pl.pallas_call(
        functools.partial(_backward_step, total=rows.shape[0], config=config),
        grid=(cores, steps),
        in_specs=[incoming, incoming, *map(_whole, constants)],
        out_specs=[block, pl.BlockSpec((None, *sums), lambda core, i: (core, 0, 0, 0))],
        out_shape=[
            _like(rows, rows.shape),
            _like(rows, (cores, *sums), jnp.float32),
        ],
        scratch_shapes=[_scratch(config), _scratch(config)],
        compiler_params=_compiler_params(
            ("parallel", "arbitrary"), config, x.dtype, precision, backward=True
        ),
        cost_estimate=_cost(rows, constants, config, backward=True),
        interpret=interpret,
        name="unitary_product_backward",
    )
    dx, summed = call(rows, g.reshape(rows.shape), *constants)
    dphases, dreflections = _parameter_gradients(jnp.sum(summed, axis=0), reflections, config)
    return (
        dx.reshape(x.shape),
        dphases.astype(phases.dtype),
        dreflections.astype(reflections.dtype),
    )


# The kernels.


def _forward_step(
    x_ref: Any,
    tables_ref: Any,
    twiddles_ref: Any,
    left_ref: Any,
    right_ref: Any,
    y_ref: Any,
    z_ref: Any,
    *,
    total: int,
    config: UnitaryConfig,
) -> None:
    table = functools.partial(_table, tables_ref)
    to_frequency, to_index = _transforms(twiddles_ref, left_ref, right_ref)

    def transform(first: jax.Array) -> None:
        z = to_frequency(_times(_read(z_ref, first, config), table(D1)))
        z = _reflect(z, table(V1), _inner(table(V1), z))
        z = to_index(_times(z, table(D2)))
        z = _reflect(z, table(V2), _inner(table(V2), z))
        _write(z_ref, first, _times(z, table(D3)), config)

    _lay_out(x_ref, z_ref, pl.program_id(0) * config.rows, total=total, config=config)
    _for_each(config.rows // config.at_once, lambda i: transform(i * config.at_once))
    _lay_back(z_ref, y_ref, config)


def _backward_step(
    x_ref: Any,
    g_ref: Any,
    tables_ref: Any,
    twiddles_ref: Any,
    left_ref: Any,
    right_ref: Any,
    dx_ref: Any,
    sums_ref: Any,
    z_ref: Any,
    dz_ref: Any,
    *,
    total: int,
    config: UnitaryConfig,
) -> None:
    table = functools.partial(_table, tables_ref)
    to_frequency, to_index = _transforms(twiddles_ref, left_ref, right_ref)

    def add(index: int, values: jax.Array) -> None:
        sums_ref[index] += jnp.sum(values, axis=0)

    def transform(first: jax.Array) -> None:
        phased = _times(_read(z_ref, first, config), table(D1))
        spectrum = to_frequency(phased)
        along1 = _inner(table(V1), spectrum)
        phased_spectrum = _times(_reflect(spectrum, table(V1), along1), table(D2))
        back = to_index(phased_spectrum)
        along2 = _inner(table(V2), back)

        d = _conjugate_times(table(D3), _read(dz_ref, first, config))
        add(2, _conjugate_times(_reflect(back, table(V2), along2), d)[1])
        dalong = _inner(table(V2), d)
        dv = _plus(_conjugate_times(along2, d), _conjugate_times(dalong, back))
        add(5, dv[0])
        add(6, dv[1])
        d = to_frequency(_reflect(d, table(V2), dalong))
        add(1, _conjugate_times(phased_spectrum, d)[1])
        d = _conjugate_times(table(D2), d)
        dalong = _inner(table(V1), d)
        dv = _plus(_conjugate_times(along1, d), _conjugate_times(dalong, spectrum))
        add(3, dv[0])
        add(4, dv[1])
        d = to_index(_reflect(d, table(V1), dalong))
        add(0, _conjugate_times(phased, d)[1])
        _write(dz_ref, first, _conjugate_times(table(D1), d), config)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    step = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    for source, target in ((x_ref, z_ref), (g_ref, dz_ref)):
        _lay_out(source, target, step * config.rows, total=total, config=config)
    _for_each(config.rows // config.at_once, lambda i: transform(i * config.at_once))
    _lay_back(dz_ref, dx_ref, config)


def _lay_out(
    x_ref: Any, z_ref: Any, first: jax.Array, *, total: int, config: UnitaryConfig
) -> None:
    """Copies [rows, features] to [(part, row) · pitch + piece, 128] in float32 with zero padding.

    Rows past the last are undefined and become zeros too.
    """
    shape = (config.rows, LANES)

    def move(piece: jax.Array) -> None:
        for part in range(2):
            values = x_ref[:, _lanes(part, piece, config)].astype(jnp.float32)
            if total % config.rows:
                row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
                values = jnp.where(row < total, values, 0.0)
            z_ref[_piece_of_rows(part, piece, config), :] = values

    _for_each(config.n1, move)
    for piece in range(config.n1, config.padded):
        for part in range(2):
            z_ref[_piece_of_rows(part, piece, config), :] = jnp.zeros(shape, jnp.float32)


def _lay_back(z_ref: Any, y_ref: Any, config: UnitaryConfig) -> None:
    """Inverts `_lay_out` and casts to the dtype of the output."""

    def move(piece: jax.Array) -> None:
        for part in range(2):
            values = z_ref[_piece_of_rows(part, piece, config), :]
            y_ref[:, _lanes(part, piece, config)] = values.astype(y_ref.dtype)

    _for_each(config.n1, move)


def _lanes(part: int, piece: jax.Array, config: UnitaryConfig) -> Any:
    return pl.ds(pl.multiple_of((part * config.n1 + piece) * LANES, LANES), LANES)


def _read(z_ref: Any, first: jax.Array, config: UnitaryConfig) -> Complex:
    real, imaginary = (
        jnp.stack([z_ref[_pieces(part, first + i, config), :] for i in range(config.at_once)])
        for part in range(2)
    )
    return real, imaginary


def _write(z_ref: Any, first: jax.Array, z: Complex, config: UnitaryConfig) -> None:
    for part in range(2):
        for i in range(config.at_once):
            z_ref[_pieces(part, first + i, config), :] = z[part][i]


def _piece_of_rows(part: int, piece: Any, config: UnitaryConfig) -> Any:
    """Returns the slice of the scratch buffer that holds one piece of every row."""
    start = part * config.rows * config.pitch + piece
    return pl.ds(start, config.rows, stride=config.pitch)


def _pieces(part: int, row: jax.Array, config: UnitaryConfig) -> Any:
    """Returns the slice of the scratch buffer that holds all pieces of one row."""
    return pl.ds((part * config.rows + row) * config.pitch, config.padded)


def _for_each(count: int, body: Callable[[jax.Array], None]) -> None:
    jax.lax.fori_loop(0, count, lambda i, _: body(i), None)


def _table(tables_ref: Any, index: int) -> Complex:
    return tables_ref[index, 0], tables_ref[index, 1]


# Complex numbers as pairs of real arrays.


def _times(a: Complex, b: Complex) -> Complex:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _conjugate_times(a: Complex, b: Complex) -> Complex:
    return a[0] * b[0] + a[1] * b[1], a[0] * b[1] - a[1] * b[0]


def _plus(a: Complex, b: Complex) -> Complex:
    return a[0] + b[0], a[1] + b[1]


def _conjugate(a: Complex) -> Complex:
    return a[0], -a[1]


def _inner(u: Complex, z: Complex) -> Complex:
    """Returns u* z of each row, [rows, 1, 1]."""
    real, imaginary = _conjugate_times(u, z)
    return (
        jnp.sum(real, axis=(1, 2), keepdims=True),
        jnp.sum(imaginary, axis=(1, 2), keepdims=True),
    )


def _reflect(z: Complex, u: Complex, along: Complex) -> Complex:
    """Returns z - 2 u (u* z) of each row, with u of length one and u* z given."""
    real, imaginary = _times((2.0 * along[0], 2.0 * along[1]), u)
    return z[0] - real, z[1] - imaginary


# The transform.


def _transforms(
    twiddles_ref: Any, left_ref: Any, right_ref: Any
) -> tuple[Callable[[Complex], Complex], Callable[[Complex], Complex]]:
    """Returns F, from index order to frequency order, and its inverse F⁻¹."""

    def twiddle(z: Complex) -> Complex:
        return _times(z, (twiddles_ref[0], twiddles_ref[1]))

    def to_frequency(z: Complex) -> Complex:
        return _over_lanes(twiddle(_over_pieces(z, left_ref)), right_ref)

    def to_index(z: Complex) -> Complex:
        z = _over_pieces(twiddle(_over_lanes(_conjugate(z), right_ref)), left_ref)
        return _conjugate(z)

    return to_frequency, to_index


def _over_pieces(z: Complex, left_ref: Any) -> Complex:
    """Transforms over n₁: one matrix times each row's real parts above its imaginary parts."""
    padded = z[0].shape[1]
    columns = [jnp.concatenate([real, imaginary]) for real, imaginary in zip(*z, strict=True)]
    found = [_product(left_ref, column, right=False) for column in columns]
    return (
        jnp.stack([column[:padded] for column in found]),
        jnp.stack([column[padded:] for column in found]),
    )


def _over_lanes(z: Complex, right_ref: Any) -> Complex:
    """Transforms over n₂: all rows' real parts beside their imaginary parts, times one matrix."""
    shape = z[0].shape
    rows = jnp.concatenate([part.reshape(-1, LANES) for part in z], axis=1)
    found = _product(right_ref, rows, right=True)
    return found[:, :LANES].reshape(shape), found[:, LANES:].reshape(shape)


def _product(matrix_ref: Any, z: jax.Array, *, right: bool) -> jax.Array:
    """Multiplies z by a constant matrix from either side, in the precision of `_encode`."""
    if matrix_ref.dtype == jnp.float32:
        return _dot(matrix_ref[0], z, right=right, precision=jax.lax.Precision.HIGHEST)
    high = z.astype(jnp.bfloat16)
    found = _dot(matrix_ref[0], high, right=right)
    if matrix_ref.shape[0] == 1:
        return found
    low = (z - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return found + (_dot(matrix_ref[1], high, right=right) + _dot(matrix_ref[0], low, right=right))


def _dot(
    matrix: jax.Array, z: jax.Array, *, right: bool, precision: jax.lax.Precision | None = None
) -> jax.Array:
    a, b = (z, matrix) if right else (matrix, z)
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


# Operands of the kernels.


def _checked(
    config: UnitaryConfig | None,
    rows: jax.Array,
    precision: jax.lax.Precision,
    *,
    backward: bool,
) -> UnitaryConfig:
    """Returns the given or the chosen configuration after checking that it fits the chip."""
    if config is not None:
        config.check(
            rows.dtype, backward=backward, precision=precision, vmem_bytes=target_vmem_bytes()
        )
        return config
    return choose_config(
        n=rows.shape[1] // 2,
        rows=rows.shape[0],
        dtype=rows.dtype,
        backward=backward,
        precision=precision,
        vmem_bytes=target_vmem_bytes(),
    )


def _tables(
    phases: Float[Array, "3 n"], reflections: Float[Array, "2 2 n"], config: UnitaryConfig
) -> Float[Array, "5 2 padded lanes"]:
    """Returns D₁, v₁, D₂, v₂, D₃, each in the order of its operand; vectors have length one."""
    d1, d2, d3 = jnp.stack([jnp.cos(phases), jnp.sin(phases)], axis=1).astype(jnp.float32)
    v1, v2 = _unit(reflections)[0]
    tables = jnp.stack(
        [
            fourier.by_index(d1, config.n1),
            fourier.by_frequency(v1, config.n1),
            fourier.by_frequency(d2, config.n1),
            fourier.by_index(v2, config.n1),
            fourier.by_index(d3, config.n1),
        ]
    )
    return jnp.pad(tables, ((0, 0), (0, 0), (0, config.padded - config.n1), (0, 0)))


def _parameter_gradients(
    sums: Float[Array, "tables padded lanes"],
    reflections: Float[Array, "2 2 n"],
    config: UnitaryConfig,
) -> tuple[Float[Array, "3 n"], Float[Array, "2 2 n"]]:
    """Returns (dphases, dreflections) from the sums over tokens.

    The sums are those of three angles, then of v₁ and v₂ in real and imaginary parts. For a
    reflection by u = v / |v|, the sum over tokens of conj(u* z) dz + conj(u* dz) z, times -2, is
    the gradient for a u of any length. Since u has length one, the part along u is removed.
    """
    sums = sums[:, : config.n1]
    index, frequency = fourier.from_index, fourier.from_frequency
    dphases = jnp.stack([index(sums[0]), frequency(sums[1]), index(sums[2])])
    free = -2.0 * jnp.stack([frequency(sums[3:5]), index(sums[5:7])])
    u, length = _unit(reflections)
    inward = jnp.sum(free * u, axis=(1, 2), keepdims=True)
    return dphases, (free - inward * u) / length


def _unit(
    reflections: Float[Array, "2 2 n"],
) -> tuple[Float[Array, "2 2 n"], Float[Array, "2 1 1"]]:
    v = reflections.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(v * v, axis=(1, 2), keepdims=True))
    return v / length, length


def _constants(
    tables: jax.Array, config: UnitaryConfig, precision: jax.lax.Precision
) -> list[jax.Array]:
    """Returns what every step reads whole: parameters, twiddle factors and the two matrices."""
    fixed = (
        fourier.twiddles(config.n1, LANES, config.padded),
        _encode(fourier.left_matrix(config.n1, config.padded), precision),
        _encode(fourier.right_matrix(LANES), precision),
    )
    varying = jax.typeof(tables).manual_axis_type.varying
    as_tables = [
        jax.lax.pcast(jnp.asarray(a), tuple(sorted(varying)), to="varying")
        if varying
        else jnp.asarray(a)
        for a in fixed
    ]
    return [tables, *as_tables]


def _encode(matrix: np.ndarray, precision: jax.lax.Precision) -> np.ndarray:
    """Returns [parts, ...]: float32 for HIGHEST, two bfloat16 terms for HIGH, one for DEFAULT."""
    exact = matrix.astype(np.float32)
    if precision == jax.lax.Precision.HIGHEST:
        return exact[None]
    high = exact.astype(jnp.bfloat16)
    if precision == jax.lax.Precision.DEFAULT:
        return high[None]
    return np.stack([high, (exact - high.astype(np.float32)).astype(jnp.bfloat16)])


def _incoming(block: pl.BlockSpec, config: UnitaryConfig) -> pl.BlockSpec:
    if config.buffers == 2:
        return block
    return pl.BlockSpec(
        block.block_shape, block.index_map, pipeline_mode=pl.Buffered(config.buffers)
    )


def _whole(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda *step: (0,) * array.ndim)


def _scratch(config: UnitaryConfig) -> Any:
    return pltpu.VMEM((2 * config.rows * config.pitch, LANES), jnp.float32)


def _like(x: jax.Array, shape: tuple[int, ...], dtype: Any = None) -> jax.ShapeDtypeStruct:
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype or x.dtype, manual_axis_type=varying)


def _compiler_params(
    semantics: tuple[Any, ...],
    config: UnitaryConfig,
    dtype: Any,
    precision: jax.lax.Precision,
    *,
    backward: bool,
) -> pltpu.CompilerParams:
    # Exactly the estimated memory, so that the compiler rejects the kernel if that is too little.
    needed = config.vmem_bytes(dtype, backward=backward, precision=precision)
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=needed + RESERVED_BYTES
    )


def _cost(
    rows: jax.Array, constants: list[jax.Array], config: UnitaryConfig, *, backward: bool
) -> pl.CostEstimate:
    """Estimates the cost for XLA's scheduler: real operations, and bytes read and written."""
    transforms, streams = (4, 3) if backward else (2, 2)
    sums = GRADIENT_TABLES * config.padded * LANES * 4 if backward else 0
    return pl.CostEstimate(
        flops=transforms * 8 * (config.padded + LANES) * rows.shape[0] * config.n,
        transcendentals=0,
        bytes_accessed=streams * rows.nbytes + sum(c.nbytes for c in constants) + sums,
    )
