"""Splits the transform and the rows for the unitary product's TPU kernels, and says why.

The transform of n = n₁ n₂ numbers is two matrix products (`kernels_pallas.unitary.fourier`). n₂ is
128, the lanes of a TPU. A row then lies in memory as n₁ whole pieces of 128 numbers, and the second
transform multiplies these pieces by a matrix in place. n₁ = n / 128 may be any number, prime or
odd, because it is a matrix product. The first transform works across the pieces of one row, so the
chip stores them one below another. Any other n₂ would need splitting and joining pieces within
lanes. That costs more than a more even split would save of the 8 (n₁ + n₂) operations per number.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.target_device import MIB, RESERVED_BYTES, SMALLEST_VMEM_BYTES

LANES = 128
"""n₂, the length of the pieces in which a TPU's vector memory (VMEM) holds the last axis."""

SUBLANES = 8
"""Granularity of the second-to-last axis for 32-bit numbers. n₁ is padded to a multiple."""

ROW_TILES = (128, 64, 32, 16, 8)
"""Numbers of rows in a step, most preferred first."""

TILE_BYTES = MIB
"""Most bytes of activations in a step, if `ROW_TILES` allows. From half a MiB on, the step's fixed
cost (about 0.3 µs) is a small part of the time to move them."""

AT_ONCE_SUBLANES = {False: 256, True: 128}
"""Most pieces of the rows that are transformed at once, by `backward`. With several rows at once
the matrix of the second transform serves more pieces per load of the matrix unit, and independent
rows fill the time of reductions. With more rows the registers spill and compilation is slow. By the
TPU compiler's schedules (v5e, bfloat16, n = 4096) a forward row takes 543 cycles one at a time, 408
two at a time, 334 four and 288 eight at a time."""

SPILLED_VALUES = {False: 6, True: 10}
"""Most complex float32 values of the rows transformed at once that the compiler spills to VMEM, by
`backward`: what it reported for v4 (5.4 and 7.5), rounded up."""

SPILLED_VALUES_HIGHEST = {False: 6, True: 16}
"""The same with transforms in `HIGHEST` precision (5.4 and 15.4)."""

PARAMETER_TABLES = 10
"""Number of real tables of n numbers that a kernel reads: D₁, D₂, D₃, v₁, v₂ in two parts."""

GRADIENT_TABLES = 7
"""Number of real tables of n numbers that sum gradients: three angles, two complex vectors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitaryConfig:
    """Size of one step.

    Attributes:
      n1: n₁, the number of pieces of 128 complex numbers in a row.
      rows: Number of rows of activations in a step.
      at_once: Number of rows that are transformed at once.
      buffers: Number of buffers of each block of activations that is read. With 2, the next block
        loads while this one is computed. With 1 it does not, for rows so long that two do not fit.

    Raises:
      ValueError: The kernels do not support a size.
    """

    n1: int
    rows: int
    at_once: int
    buffers: int = 2

    def __post_init__(self) -> None:
        if self.n1 < 1:
            raise ValueError(f"n1 is {self.n1} but must be at least 1")
        if self.rows < SUBLANES or self.rows % SUBLANES:
            raise ValueError(f"rows is {self.rows} but must be a multiple of {SUBLANES}")
        if self.at_once < 1 or self.rows % self.at_once:
            raise ValueError(f"at_once is {self.at_once} but must divide rows={self.rows}")
        if self.buffers not in (1, 2):
            raise ValueError(f"buffers is {self.buffers} but must be 1 or 2")

    @property
    def n(self) -> int:
        """The number of complex numbers in a row."""
        return self.n1 * LANES

    @property
    def padded(self) -> int:
        """n₁ rounded up to whole sublanes."""
        return round_up(self.n1, SUBLANES)

    @property
    def pitch(self) -> int:
        """The number of sublanes from one row's pieces to the next row's, on the chip.

        It is odd, so that one piece of each of eight rows lie in eight banks of VMEM and move in
        one cycle. At a multiple of eight they would take eight cycles.
        """
        return self.padded + 1

    def vmem_bytes(self, dtype: DTypeLike, *, backward: bool, precision: jax.lax.Precision) -> int:
        """Returns the VMEM of a step, in bytes.

        Args:
          dtype: Dtype of the activations.
          backward: Whether it is a backward step, which reads two blocks of activations, writes
            one, and sums gradients. A forward step reads one block and writes one.
          precision: Precision of the transforms (`resolve_precision`).
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
        """Raises ValueError if the step does not fit the chip.

        Args:
          dtype: Dtype of the activations.
          backward: As for `vmem_bytes`.
          precision: As for `vmem_bytes`.
          vmem_bytes: VMEM of the chip (`kernels_pallas.target_device.VMEM_BYTES`).
        """
        needed = self.vmem_bytes(dtype, backward=backward, precision=precision)
        if needed > vmem_bytes - RESERVED_BYTES:
            raise ValueError(
                f"{self.rows} rows of {2 * self.n} features in {jnp.dtype(dtype).name} need"
                f" {needed / MIB:.1f} MiB of vector memory in the"
                f" {'backward' if backward else 'forward'} pass, and the chip has"
                f" {(vmem_bytes - RESERVED_BYTES) / MIB:.1f} MiB to spare"
            )


def resolve_precision(precision: jax.lax.Precision | None, dtype: DTypeLike) -> jax.lax.Precision:
    """Returns the precision of the transforms; by default one that matches float32 for `dtype`.

    A TPU multiplies bfloat16 numbers. `DEFAULT` rounds each operand to bfloat16. `HIGH` splits each
    operand into a sum of two and takes three products, `HIGHEST` into three and takes six. Over the
    four products of the map, `DEFAULT` has three times the error of rounding the result to
    bfloat16. `HIGH` has an error of 1e-5, invisible in bfloat16 results. Float32 results need
    `HIGHEST`.

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
    """Returns the step with as many rows as `TILE_BYTES` and the chip allow.

    Args:
      n: Number of complex numbers in a row.
      rows: Total number of rows of activations.
      dtype: Dtype of the activations.
      backward: As for `UnitaryConfig.vmem_bytes`.
      precision: Precision of the transforms (`resolve_precision`).
      vmem_bytes: VMEM of the chip.

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
            f"{n} complex numbers in a row are not a multiple of {LANES}, the lanes of a TPU. Use a"
            f" width that is a multiple of {2 * LANES}"
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
    raise AssertionError("the last configuration fits but was not chosen")


def round_up(number: int, unit: int) -> int:
    """Rounds up to a multiple of `unit`.

    Example:
      >>> round_up(43, 8)
      48
    """
    return -(-number // unit) * unit


def _at_once(padded: int, *, backward: bool) -> int:
    """Returns the largest power of two up to eight whose rows `AT_ONCE_SUBLANES` allows."""
    limit = AT_ONCE_SUBLANES[backward]
    return max(rows for rows in (1, 2, 4, 8) if rows == 1 or rows * padded <= limit)
