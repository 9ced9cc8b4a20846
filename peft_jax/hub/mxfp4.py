"""Reads kernels of experts that are packed as MXFP4, as gpt-oss is published.

A block is 32 consecutive inputs of one output: 16 bytes of two 4-bit floats (E2M1) each, the first
in the lower half, and one byte for a power of two (E8M0) that multiplies all of them.

    model.layers.0.mlp.experts.down_proj_blocks    [experts, out, in / 32, 16]
    model.layers.0.mlp.experts.down_proj_scales    [experts, out, in / 32]

Its values are exact in bfloat16.

Source: Open Compute Project, 2023, Microscaling Formats (MX) Specification 1.0, section 5.
"""

import dataclasses
import itertools
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from peft_jax.hub.finite import check_finite
from peft_jax.hub.leaf_sources import Ranges
from peft_jax.hub.tensors import StoredTensor

BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of the two tensors that replace a kernel's."""

_BLOCK = 32
_LEVELS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate([_LEVELS, -_LEVELS])
"""The values of 4-bit floats by their bits: sign, two bits of exponent, one of mantissa."""
_PAIRS = np.stack([_E2M1[np.arange(256) & 0x0F], _E2M1[np.arange(256) >> 4]], axis=-1)
"""The two values of each byte."""

_BIAS = 127
_NAN = 255


def packed_names(name: str, stored: Collection[str]) -> list[str]:
    """Returns the names of the tensors that hold a kernel: its own, or two that are packed.

    Args:
      name: Name of the kernel's tensor.
      stored: Names of the tensors in the checkpoint.
    """
    if name not in stored and name + BLOCKS in stored:
        return [name + BLOCKS, name + SCALES]
    return [name]


def packed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor of an expert's leaf, which is packed if its name says so.

    Example:
      >>> packed_shape("down_proj_blocks", (4, 64, 8)), packed_shape("down_proj_scales", (4, 64, 8))
      ((4, 8, 2, 16), (4, 8, 2))
    """
    if not name.endswith((BLOCKS, SCALES)):
        return shape
    experts, d_in, d_out = shape
    blocks = (experts, d_out, d_in // _BLOCK)
    return (*blocks, _BLOCK // 2) if name.endswith(BLOCKS) else blocks


def unpack(
    blocks: UInt8[np.ndarray, "*stack blocks bytes"], scales: UInt8[np.ndarray, "*stack blocks"]
) -> Float32[np.ndarray, "*stack inputs"]:
    """Returns the values of packed blocks; NaN where a scale is NaN.

    Example:
      >>> unpack(np.uint8([[0x21, 0xF7]]), np.uint8([128])).tolist()
      [1.0, 2.0, 12.0, -12.0]
    """
    # The largest powers and products are beyond float32 and become infinite.
    with np.errstate(over="ignore"):
        powers = np.ldexp(np.float32(1), scales.astype(np.int32) - _BIAS)
        powers = np.where(scales == _NAN, np.float32(np.nan), powers)
        values = _PAIRS[blocks] * powers[..., None, None]
    return values.reshape(*blocks.shape[:-2], -1)


@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """Kernels [layers, experts, in, out] that are packed.

    Attributes:
      tensors: Blocks and scales of each layer, in turn.
    """

    tensors: Sequence[StoredTensor]

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.dtype != "U8":
                raise ValueError(
                    f"{tensor.name} in {tensor.file} has the dtype {tensor.dtype}, but packed"
                    " kernels must have U8"
                )

    @property
    def dtypes(self) -> set[str]:
        """The dtype that holds all values."""
        return {"BF16"}

    def read_into(self, target: np.ndarray, ranges: Ranges) -> None:
        """Fills `target` with a range of the leaf, converted to the dtype of `target`.

        Raises:
          ValueError: A value is NaN or infinite; the message names the tensor.
        """
        layers, experts, inputs, outputs = ranges
        for layer, expert in itertools.product(range(*layers), range(*experts)):
            blocks, scales = self.tensors[2 * layer : 2 * layer + 2]
            one, columns = slice(expert, expert + 1), slice(*outputs)
            pieces = zip(
                blocks.pieces(one, columns, np.dtype(np.uint8)),
                scales.pieces(one, columns, np.dtype(np.uint8)),
                strict=True,
            )
            for (_, packed), (_, powers) in pieces:
                values = unpack(packed[0], powers[0])[:, slice(*inputs)]
                check_finite(values, target.dtype, name=scales.name, where=str(scales.file))
                target[layer - layers[0], expert - experts[0]] = values.T
