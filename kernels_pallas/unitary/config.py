"""How the TPU's kernels cut up the transform and the rows, and why.

The transform of n = n₁ n₂ numbers is two matrix products (`kernels_pallas.unitary.fourier`). n₂ is
the 128 lanes of a TPU: a row lies in memory as n₁ pieces of 128 numbers, each of which is whole,
and the second transform multiplies those pieces by a matrix as they are. n₁ is what is left, any
number: a matrix product minds neither primes nor odd numbers. The first transform works across the
pieces of one row, so they are laid one under another on the chip. Any other n₂ would have pieces
cut and joined within lanes, which costs more than the 8 (n₁ + n₂) operations a number that a more
even split would save.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.chips import MIB, RESERVED_BYTES, SMALLEST_VMEM_BYTES

LANES = 128
"""n₂: the last axis of what a TPU's vector memory holds comes in pieces of so many."""

SUBLANES = 8
"""The second to last axis likewise, in 32-bit numbers: n₁ is padded with zeros to a multiple."""

ROW_TILES = (128, 64, 32, 16, 8)
"""Rows of a step, from the most wished for."""

TILE_BYTES = MIB
"""Activations of a step at most, once `ROW_TILES` allows: from half a MiB on the step's fixed cost
(about 0.3 µs) is a small part of the time that it takes to move them."""

AT_ONCE_SUBLANES = {False: 256, True: 128}
"""Rows whose pieces are up to so many in all, forwards and backwards, are turned at once. The
matrix of the second transform then serves more pieces each time the matrix unit is loaded with it,
and rows that do not wait for one another fill the time of reductions. With more, what they hold is
spilled from registers, and the program takes long to compile. By the schedules of the TPU's
compiler (v5e, bfloat16, n = 4096) a row takes 543 cycles forwards one at a time, 408 two, 334 four
and 288 eight at a time."""

SPILLED_VALUES = {False: 6, True: 10}
"""Complex float32 values of the rows turned at once that the compiler spills to vector memory at
most, forwards and backwards: what it reported for v4 (5.4 and 7.5), rounded up."""

SPILLED_VALUES_HIGHEST = {False: 6, True: 16}
"""The same where the transforms are multiplied in `HIGHEST` (5.4 and 15.4)."""

PARAMETER_TABLES = 10
"""Real tables of n numbers that a kernel reads: D₁, D₂, D₃, v₁ and v₂, real and imaginary."""

GRADIENT_TABLES = 7
"""Real tables of n numbers that a kernel sums gradients in: three angles, two complex vectors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitaryConfig:
    """What one step works on.

    Attributes:
      n1: n₁, pieces of 128 complex numbers in a row.
      rows: of activations in a step.
      at_once: how many of them are turned at once.
      buffers: of each block of activations that comes in: with 2 the next one comes while this one
        is worked on; with 1 it does not, which is for rows so long that two do not fit.

    Raises:
      ValueError: a size that the kernels cannot work with.
    """

    n1: int
    rows: int
    at_once: int
    buffers: int = 2

    def __post_init__(self) -> None:
        if self.n1 < 1:
            raise ValueError(f"n1 must be at least 1, but is {self.n1}")
        if self.rows < SUBLANES or self.rows % SUBLANES:
            raise ValueError(f"rows must be a multiple of {SUBLANES}, but is {self.rows}")
        if self.at_once < 1 or self.rows % self.at_once:
            raise ValueError(f"at_once must divide the rows, {self.rows}, but is {self.at_once}")
        if self.buffers not in (1, 2):
            raise ValueError(f"buffers must be 1 or 2, but is {self.buffers}")

    @property
    def n(self) -> int:
        """Complex numbers in a row."""
        return self.n1 * LANES

    @property
    def padded(self) -> int:
        """n₁ rounded up to whole sublanes."""
        return round_up(self.n1, SUBLANES)

    @property
    def pitch(self) -> int:
        """Sublanes from one row's pieces to the next row's, on the chip.

        It is odd, so that one piece of each of eight rows lie in eight banks of the vector memory
        and are moved in one cycle; at a multiple of eight it takes eight.
        """
        return self.padded + 1

    def vmem_bytes(self, dtype: DTypeLike, *, backward: bool, precision: jax.lax.Precision) -> int:
        """The vector memory of a step, in bytes.

        Args:
          dtype: of the activations.
          backward: the step back reads two blocks of activations, writes one, and sums gradients;
            the step forwards reads one and writes one.
          precision: of the transforms (`resolve_precision`).
        """
        block = self.rows * 2 * self.n * jnp.dtype(dtype).itemsize
        blocks = (self.buffers * (2 if backward else 1) + 2) * block
        table = self.padded * LANES * 4
        scratch = (2 if backward else 1) * 2 * self.rows * self.pitch * LANES * 4
        numbers = (2 * self.padded) ** 2 + (2 * LANES) ** 2
        matrices = numbers * (2 if precision == jax.lax.Precision.DEFAULT else 4)
        tables = (PARAMETER_TABLES + 2 + (2 * GRADIENT_TABLES if backward else 0)) * table
        highest = precision == jax.lax.Precision.HIGHEST
        values = (SPILLED_VALUES_HIGHEST if highest else SPILLED_VALUES)[backward]
        spilled = values * 2 * table * self.at_once
        return blocks + scratch + matrices + tables + spilled

    def check(
        self,
        dtype: DTypeLike,
        *,
        backward: bool,
        precision: jax.lax.Precision,
        vmem_bytes: int,
    ) -> None:
        """Refuses a step that does not fit the chip.

        Args:
          dtype: of the activations.
          backward: as for `vmem_bytes`.
          precision: as for `vmem_bytes`.
          vmem_bytes: vector memory of the chip (`kernels_pallas.chips.VMEM_BYTES`).

        Raises:
          ValueError: with what it needs and what there is.
        """
        needed = self.vmem_bytes(dtype, backward=backward, precision=precision)
        if needed > vmem_bytes - RESERVED_BYTES:
            raise ValueError(
                f"{self.rows} rows of {2 * self.n} features in {jnp.dtype(dtype).name} need"
                f" {needed / MIB:.1f} MiB of the chip's vector memory"
                f" {'backwards' if backward else 'forwards'}, which has"
                f" {(vmem_bytes - RESERVED_BYTES) / MIB:.1f} MiB to spare"
            )


def resolve_precision(precision: jax.lax.Precision | None, dtype: DTypeLike) -> jax.lax.Precision:
    """What the transforms are multiplied in: by default, as good as float32 for these activations.

    A TPU multiplies bfloat16 numbers. `DEFAULT` rounds to them once; `HIGH` takes each number as a
    sum of two, in three products; `HIGHEST` as three, in six. Through the four products of the map,
    rounding once leaves an error three times that of rounding the result to bfloat16; `HIGH` leaves
    1e-5, invisible in bfloat16 results; float32 results need `HIGHEST`.

    Example:
      >>> resolve_precision(None, jnp.bfloat16).name, resolve_precision(None, jnp.float32).name
      ('HIGH', 'HIGHEST')
    """
    if precision is not None:
        return precision
    if jnp.dtype(dtype).itemsize == 2:
        return jax.lax.Precision.HIGH
    return jax.lax.Precision.HIGHEST


def choose_config(
    *,
    n: int,
    rows: int,
    dtype: DTypeLike,
    backward: bool,
    precision: jax.lax.Precision,
    vmem_bytes: int = SMALLEST_VMEM_BYTES,
) -> UnitaryConfig:
    """As many rows as `TILE_BYTES` and the chip allow.

    Args:
      n: complex numbers in a row.
      rows: of activations in all.
      dtype: of the activations.
      backward: as for `UnitaryConfig.vmem_bytes`.
      precision: of the transforms (`resolve_precision`).
      vmem_bytes: vector memory of the chip.

    Raises:
      ValueError: n is not a multiple of the lanes, or not even eight rows fit the chip.

    Example:
      >>> choose_config(
      ...     n=4096, rows=8192, dtype=jnp.bfloat16, backward=False,
      ...     precision=jax.lax.Precision.HIGH,
      ... )
      UnitaryConfig(n1=32, rows=64, at_once=8, buffers=2)
    """
    if n < LANES or n % LANES:
        raise ValueError(
            f"{n} complex features are not a multiple of {LANES}, the lanes of a TPU; widths that"
            f" work are multiples of {2 * LANES}"
        )
    n1 = n // LANES
    at_once = _at_once(round_up(n1, SUBLANES), backward=backward)
    wanted = max(
        SUBLANES,
        min(round_up(max(rows, 1), SUBLANES), TILE_BYTES // (2 * n * jnp.dtype(dtype).itemsize)),
    )
    tried = [
        UnitaryConfig(n1=n1, rows=tile, at_once=min(at_once, tile), buffers=buffers)
        for buffers in (2, 1)
        for tile in ROW_TILES
        if tile <= wanted
    ]
    for config in tried:
        needed = config.vmem_bytes(dtype, backward=backward, precision=precision)
        if needed <= vmem_bytes - RESERVED_BYTES:
            return config
    tried[-1].check(dtype, backward=backward, precision=precision, vmem_bytes=vmem_bytes)
    raise AssertionError("the last configuration fits, but was not taken")


def round_up(number: int, unit: int) -> int:
    """The next multiple of a unit.

    Example:
      >>> round_up(43, 8)
      48
    """
    return -(-number // unit) * unit


def _at_once(padded: int, *, backward: bool) -> int:
    """The largest power of two of rows, to eight, whose pieces `AT_ONCE_SUBLANES` allows."""
    limit = AT_ONCE_SUBLANES[backward]
    return max(rows for rows in (1, 2, 4, 8) if rows == 1 or rows * padded <= limit)
