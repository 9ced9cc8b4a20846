"""Kernels of 4-bit integers with scales and zero points, as GPTQ and AWQ pack them.

A group of consecutive inputs of one output shares a scale and a zero point:

    value = scale · (code - zero)

A 32-bit word holds eight codes. GPTQ packs eight inputs of one output, `qweight` [in / 8, out]. AWQ
packs eight outputs of one input in the order 0, 2, 4, 6, 1, 3, 5, 7, `qweight` [in, out / 8]. Both
pack the zero points of eight outputs, each as its own kernel's outputs, `qzeros` [groups, out / 8].
The scales are [groups, out].

Sources: Frantar et al., 2022, arXiv 2210.17323; Lin et al., 2023, arXiv 2306.00978.
"""

import abc
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Int, Int32

from peft_jax.hub.packed_tensors import PackedKernel, Range, check_part, read_part
from peft_jax.hub.tensors import DTYPES, StoredTensor
from peft_jax.models.packed_kernels import Packing

_IN_WORD = 8
_IN_ORDER = np.arange(_IN_WORD)
_INTERLEAVED = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_FLOATS = ("F16", "BF16", "F32")


def unpack_words(
    words: Int32[np.ndarray, "*leading words"], order: Int[np.ndarray, " eight"]
) -> Int32[np.ndarray, "*leading codes"]:
    """Returns the codes of words along the last axis.

    Args:
      words: Words of eight codes, the lowest bits first.
      order: Place of each code of a word among the eight.

    Example:
      >>> unpack_words(np.array([0x76543210], np.int32), np.arange(8)).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    shifts = np.empty(_IN_WORD, np.int32)
    shifts[order] = 4 * np.arange(_IN_WORD)
    codes = (words[..., None] >> shifts) & 0x0F
    return codes.reshape(*words.shape[:-1], -1)


class Int4Kernel(PackedKernel):
    """A kernel of 4-bit integers."""

    order = _IN_ORDER

    @classmethod
    def find_shape(cls, parts: Mapping[str, StoredTensor], packing: Packing) -> tuple[int, int]:
        """Returns (out, in)."""
        outputs, inputs = cls.shape_of(parts[cls.ends[0]])
        size = inputs if packing.group_size == -1 else packing.group_size
        groups = math.ceil(inputs / size)
        check_part(parts["qzeros"], ("I32",), (groups, outputs // _IN_WORD))
        check_part(parts["scales"], _FLOATS, (groups, outputs))
        if "g_idx" in parts:
            check_part(parts["g_idx"], ("I32",), (inputs,))
            if not np.array_equal(read_part(parts["g_idx"], np.int32), np.arange(inputs) // size):
                raise ValueError(
                    f"{parts['g_idx'].name} in {parts['g_idx'].file} groups inputs out of order"
                    " (desc_act), which is not implemented"
                )
        return outputs, inputs

    @classmethod
    @abc.abstractmethod
    def shape_of(cls, qweight: StoredTensor) -> tuple[int, int]:
        """Returns (out, in) of the packed codes."""

    @abc.abstractmethod
    def codes(self, outputs: Range, inputs: Range) -> Int32[np.ndarray, "inputs outputs"]:
        """Returns a range of the codes."""

    def unpack(self, outputs: Range, inputs: Range) -> Float32[np.ndarray, "outputs inputs"]:
        """Returns a range of the values."""
        size = self.shape[1] if self.packing.group_size == -1 else self.packing.group_size
        groups = inputs[0] // size, math.ceil(inputs[1] / size)
        stored = self.parts["scales"]
        scales = read_part(stored, DTYPES[stored.dtype], groups, outputs).astype(np.float32)
        words = outputs[0] // _IN_WORD, math.ceil(outputs[1] / _IN_WORD)
        zeros = unpack_words(read_part(self.parts["qzeros"], np.int32, groups, words), self.order)
        zeros = zeros[:, : outputs[1] - outputs[0]]
        if self.packing.zero_offset and zeros.max(initial=0) == 0x0F:
            raise ValueError(
                f"{self.parts['qzeros'].name} in {self.file} has a zero point of 0 or 16, which"
                " programs read in different ways; pack the kernel as gptq_v2"
            )
        zeros = zeros + self.packing.zero_offset
        group = np.arange(*inputs) // size - groups[0]
        codes = self.codes(outputs, inputs)
        values = (codes - zeros[group]).astype(np.float32) * scales[group]
        return np.ascontiguousarray(values.T)


class GptqKernel(Int4Kernel):
    """A kernel of GPTQ."""

    required = ("qweight", "qzeros", "scales")
    ends = (*required, "g_idx")

    @classmethod
    def shape_of(cls, qweight: StoredTensor) -> tuple[int, int]:
        """Returns (out, in) of the packed codes."""
        words, outputs = qweight.shape
        check_part(qweight, ("I32",), (words, outputs))
        return outputs, words * _IN_WORD

    def codes(self, outputs: Range, inputs: Range) -> Int32[np.ndarray, "inputs outputs"]:
        """Returns a range of the codes."""
        words = inputs[0] // _IN_WORD, math.ceil(inputs[1] / _IN_WORD)
        packed = read_part(self.parts["qweight"], np.int32, words, outputs)
        first = inputs[0] - words[0] * _IN_WORD
        codes = unpack_words(np.ascontiguousarray(packed.T), self.order).T
        return codes[first : first + inputs[1] - inputs[0]]


class AwqKernel(Int4Kernel):
    """A kernel of AWQ."""

    required = ends = ("qweight", "qzeros", "scales")
    order = _INTERLEAVED

    @classmethod
    def shape_of(cls, qweight: StoredTensor) -> tuple[int, int]:
        """Returns (out, in) of the packed codes."""
        inputs, words = qweight.shape
        check_part(qweight, ("I32",), (inputs, words))
        return words * _IN_WORD, inputs

    def codes(self, outputs: Range, inputs: Range) -> Int32[np.ndarray, "inputs outputs"]:
        """Returns a range of the codes."""
        words = outputs[0] // _IN_WORD, math.ceil(outputs[1] / _IN_WORD)
        packed = read_part(self.parts["qweight"], np.int32, inputs, words)
        return unpack_words(packed, self.order)[:, : outputs[1] - outputs[0]]
