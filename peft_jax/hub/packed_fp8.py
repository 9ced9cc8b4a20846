"""Kernels of 8-bit floats (E4M3) with a scale for each block, as DeepSeek-V3 is published.

A block is 128 outputs by 128 inputs, which `weight_scale_inv` [out / 128, in / 128] multiplies.

Source: DeepSeek-AI, 2024, arXiv 2412.19437, section 3.3.
"""

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from peft_jax.hub.packed_tensors import PackedKernel, Range, check_part, read_part
from peft_jax.hub.tensors import DTYPES, StoredTensor
from peft_jax.models.packed_kernels import Packing


class Fp8Kernel(PackedKernel):
    """A kernel of 8-bit floats."""

    required = ends = ("_scale_inv", "")

    @classmethod
    def find_shape(cls, parts: Mapping[str, StoredTensor], packing: Packing) -> tuple[int, int]:
        """Returns (out, in)."""
        outputs, inputs = parts[""].shape
        check_part(parts[""], ("F8_E4M3",), (outputs, inputs))
        rows, columns = packing.block_shape
        blocks = math.ceil(outputs / rows), math.ceil(inputs / columns)
        check_part(parts["_scale_inv"], ("F32", "BF16"), blocks)
        return outputs, inputs

    def unpack(self, outputs: Range, inputs: Range) -> Float32[np.ndarray, "outputs inputs"]:
        """Returns a range of the values."""
        values = read_part(self.parts[""], ml_dtypes.float8_e4m3fn, outputs, inputs)
        stored = self.parts["_scale_inv"]
        scales = read_part(stored, DTYPES[stored.dtype]).astype(np.float32)
        row, column = (
            np.arange(*at) // size
            for at, size in zip((outputs, inputs), self.packing.block_shape, strict=True)
        )
        return values.astype(np.float32) * scales[np.ix_(row, column)]
