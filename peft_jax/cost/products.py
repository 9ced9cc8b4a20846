"""Reads the matrix products of a compiled program, and the time that their shapes allow.

TPU compilers write all products as convolutions, whose windows express the axes of a batched
product: an axis of the batch is dilated by its size, an axis that only the kernel has is a window
over one padded element. So only the valid pairs of window positions and elements count.
"""

import dataclasses
import math
import re

import numpy as np

from peft_jax.cost.hlo import Array, Instruction, bits_of

_DIGITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """Matrix products of one shape: `groups` times [rows, summed] x [summed, columns].

    Attributes:
      groups: Number of products.
      rows: Number of rows of the result.
      columns: Number of columns of the result.
      summed: Number of terms of each of the result's elements.
      passes: Number of passes in bfloat16; 3 or 6 for float32 at a higher precision.
      narrow: Whether both factors have elements of 8 bits or less.
    """

    groups: float | int
    rows: float | int
    columns: float | int
    summed: float | int
    passes: int = 1
    narrow: bool = False

    @property
    def flops(self) -> float:
        """Number of operations, where a multiply-add counts as two."""
        return 2.0 * self.groups * self.rows * self.columns * self.summed

    def computed(self, tile: int) -> float:
        """Returns the operations that a matrix unit of `tile` x `tile` spends.

        One factor's tile stays in the unit while the rows of the other stream through it. Loading
        the next tile takes `tile` cycles, which at least as many rows hide.

        Example:
          >>> Product(groups=1, rows=4096, columns=4096, summed=4096).computed(128) == 2 * 4096**3
          True
          >>> small = Product(groups=8, rows=4096, columns=32, summed=32)
          >>> small.computed(128) / small.flops
          16.0
        """
        summed = _up(self.summed, tile)
        streamed = [
            _up(held, tile) * max(_up(through, 8), tile)
            for held, through in ((self.columns, self.rows), (self.rows, self.columns))
        ]
        return 2.0 * self.groups * self.passes * summed * min(streamed)


def read_product(one: Instruction, left: Array | None, right: Array | None) -> Product | None:
    """Returns the product of an instruction; None if it is none.

    Args:
      one: Instruction.
      left: Its first operand's array.
      right: Its second operand's array.
    """
    if left is None or right is None:
        return None
    if one.opcode == "convolution":
        return _convolution(one, left, right)
    if one.opcode == "dot":
        return _dot(one, left, right)
    if one.opcode == "custom-call" and '"__cublas$' in one.attributes:
        return _cublas(one, left, right)
    return None


def _dot(one: Instruction, left: Array, right: Array) -> Product:
    def axes(name: str) -> list[int]:
        return [int(n) for n in _DIGITS.findall(one.attribute(name) or "")]

    return _contraction(one, left, right, axes("lhs_contracting_dims"), axes("lhs_batch_dims"))


def _cublas(one: Instruction, left: Array, right: Array) -> Product | None:
    """Returns the product of a call of cuBLAS, whose dimensions are in its configuration."""

    def axes(name: str) -> list[int]:
        match = re.search(rf'"{name}":\[([^\]]*)\]', one.attributes)
        return [int(n) for n in _DIGITS.findall(match[1])] if match else []

    return _contraction(
        one, left, right, axes("lhs_contracting_dimensions"), axes("lhs_batch_dimensions")
    )


def _contraction(
    one: Instruction, left: Array, right: Array, contracting: list[int], batch: list[int]
) -> Product:
    summed = math.prod(left.shape[axis] for axis in contracting)
    groups = math.prod(left.shape[axis] for axis in batch)
    return Product(
        groups=groups,
        rows=left.size / max(summed * groups, 1),
        columns=right.size / max(summed * groups, 1),
        summed=summed,
        passes=_passes(one),
        narrow=_narrow(left, right),
    )


def _convolution(one: Instruction, left: Array, right: Array) -> Product:
    labels = one.attribute("dim_labels") or ""
    inputs, rest = labels.split("_")
    kernel, outputs = rest.split("->")
    out = one.result[0].shape
    feature_groups = int(one.attribute("feature_group_count") or 1)
    batch_groups = int(one.attribute("batch_group_count") or 1)
    groups = float(feature_groups * batch_groups)
    rows = float(out[outputs.index("b")])
    columns = out[outputs.index("f")] / groups
    summed = float(right.shape[kernel.index("i")])
    window = _window(one, sum(label.isdigit() for label in inputs))
    for axis, sizes in enumerate(window):
        label = str(axis)
        size, results = left.shape[inputs.index(label)], out[outputs.index(label)]
        pairs = _valid_pairs(size, results, sizes)
        if sizes.size == 1:
            rows *= results
        elif size == 1:
            columns *= results
        elif results == 1:
            summed *= pairs
        elif pairs == results:
            groups *= results
        else:
            rows *= results
            summed *= pairs / max(results, 1)
    return Product(
        groups=groups,
        rows=rows,
        columns=columns,
        summed=summed,
        passes=_passes(one),
        narrow=_narrow(left, right),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Window:
    """A convolution's window along one axis."""

    size: int
    stride: int
    low: int
    input_dilation: int
    window_dilation: int


def _window(one: Instruction, axes: int) -> list[_Window]:
    text = one.attribute("window") or ""

    def numbers(name: str, default: str) -> list[str]:
        match = re.search(rf"\b{name}=(\S+?)[ }}]", text)
        return match[1].split("x") if match else [default] * axes

    return [
        _Window(
            size=int(size),
            stride=int(stride),
            low=int(pad.split("_")[0]),
            input_dilation=int(inner),
            window_dilation=int(outer),
        )
        for size, stride, pad, inner, outer in zip(
            numbers("size", "1"),
            numbers("stride", "1"),
            numbers("pad", "0_0"),
            numbers("lhs_dilate", "1"),
            numbers("rhs_dilate", "1"),
            strict=True,
        )
    ]


def _valid_pairs(size: int, results: int, window: _Window) -> int:
    """Returns the number of pairs of a result and a window's position that meet an element."""
    pairs = 0
    starts = np.arange(results, dtype=np.int64) * window.stride - window.low
    for position in range(window.size):
        at = starts + position * window.window_dilation
        element, between = np.divmod(at, window.input_dilation)
        pairs += int(np.sum((between == 0) & (element >= 0) & (element < size)))
    return pairs


def _passes(one: Instruction) -> int:
    precision = one.attribute("operand_precision") or ""
    if "highest" in precision:
        return 6
    return 3 if "high" in precision else 1


def _narrow(left: Array, right: Array) -> bool:
    return bits_of(left.dtype) <= 8 and bits_of(right.dtype) <= 8


def _up(number: float | int, step: int) -> float | int:
    return math.ceil(number / step) * step
