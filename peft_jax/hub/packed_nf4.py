"""Kernels that bitsandbytes packed as NF4, with or without double quantization.

The values [out, in] are taken row by row. Two of them share a byte, the first in its upper half.
Blocks of 64 share a largest magnitude, `absmax`. With double quantization these are bytes, which
number the 256 levels of `nested_quant_map`; blocks of 256 share `nested_absmax`, and all of them
`nested_offset`:

    value = quant_map[code] · (nested_quant_map[absmax] · nested_absmax + nested_offset)

Source: Dettmers et al., 2023, arXiv 2305.14314, section 3.
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from peft_jax.hub.packed_tensors import PackedKernel, Range, check_part, read_part
from peft_jax.hub.tensors import StoredTensor
from peft_jax.models.packed_kernels import Packing

_STATE = ".quant_state.bitsandbytes__nf4"


class Nf4Kernel(PackedKernel):
    """A kernel of bitsandbytes."""

    required = (_STATE, "", ".absmax", ".quant_map")
    ends = (*required, ".nested_absmax", ".nested_quant_map")

    @classmethod
    def find_shape(cls, parts: Mapping[str, StoredTensor], packing: Packing) -> tuple[int, int]:
        """Returns (out, in), which are stored beside the kernel."""
        del packing
        state = _read_state(parts[_STATE])
        outputs, inputs = state["shape"]
        if inputs % 2:
            raise ValueError(
                f"{parts[''].name} in {parts[''].file} has {inputs} inputs, but packed kernels must"
                " have an even number"
            )
        count = outputs * inputs
        blocks = math.ceil(count / state["blocksize"])
        check_part(parts[""], ("U8",), (count // 2, 1))
        check_part(parts[".quant_map"], ("F32",), (16,))
        if ".nested_absmax" in parts and ".nested_quant_map" in parts:
            nested = math.ceil(blocks / state["nested_blocksize"])
            check_part(parts[".absmax"], ("U8",), (blocks,))
            check_part(parts[".nested_absmax"], ("F32",), (nested,))
            check_part(parts[".nested_quant_map"], ("F32",), (256,))
        else:
            check_part(parts[".absmax"], ("F32",), (blocks,))
        return outputs, inputs

    def unpack(self, outputs: Range, inputs: Range) -> Float32[np.ndarray, "outputs inputs"]:
        """Returns a range of the values."""
        start, stop = (row * self.shape[1] for row in outputs)
        packed = read_part(self.parts[""], np.uint8, (start // 2, stop // 2))[:, 0]
        codes = np.stack([packed >> 4, packed & 0x0F], axis=-1).reshape(-1)
        levels = read_part(self.parts[".quant_map"], np.float32)
        size = self._state["blocksize"]
        first = start // size
        scales = self._scales((first, math.ceil(stop / size)))
        block = np.arange(start, stop) // size - first
        values = (levels[codes] * scales[block]).reshape(-1, self.shape[1])
        return values[:, slice(*inputs)]

    def _scales(self, blocks: Range) -> Float32[np.ndarray, " blocks"]:
        """Returns the largest magnitudes of some blocks."""
        if ".nested_absmax" not in self.parts:
            return read_part(self.parts[".absmax"], np.float32, blocks)
        codes = read_part(self.parts[".absmax"], np.uint8, blocks)
        levels = read_part(self.parts[".nested_quant_map"], np.float32)
        largest = read_part(self.parts[".nested_absmax"], np.float32)
        group = np.arange(*blocks) // self._state["nested_blocksize"]
        return levels[codes] * largest[group] + np.float32(self._state["nested_offset"])

    @property
    def _state(self) -> dict[str, Any]:
        return _read_state(self.parts[_STATE])


@functools.lru_cache(maxsize=4096)
def _read_state(tensor: StoredTensor) -> dict[str, Any]:
    """Reads the settings of one kernel, which are stored as the bytes of a JSON object.

    Raises:
      ValueError: They are not what bitsandbytes writes.
    """
    where = f"{tensor.name} in {tensor.file}"
    try:
        state = json.loads(read_part(tensor, np.uint8).tobytes())
        shape, size = state["shape"], state["blocksize"]
        whole = [*shape, size, state.get("nested_blocksize", 1)]
        is_plain = all(type(one) is int and one > 0 for one in whole) and len(shape) == 2
        float(state.get("nested_offset", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not the state of a packed kernel: {error}") from error
    if not is_plain or state.get("quant_type") != "nf4":
        raise ValueError(f"{where} describes no NF4 kernel with two axes: {state}")
    return state
