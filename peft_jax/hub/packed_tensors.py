"""Unpacks the kernels of quantized checkpoints while they are read.

A packed kernel has the name, the shape [out, in] and the methods of a stored one, so that nothing
else knows of it. Its values are computed in float32, from the tensors that replace it:

    bitsandbytes    weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4, …
    gptq, awq       qweight, qzeros, scales
    fp8             weight, weight_scale_inv
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32

from peft_jax.hub.tensors import StoredTensor
from peft_jax.models.packed_kernels import Packing

_AT_ONCE = 2**22
"""Number of values unpacked at once, approximately."""

_STEP = 128
"""Pieces start at multiples of this output, so that no word or block is split."""

Range = tuple[int, int]
"""Range [start, stop) of an axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedKernel(StoredTensor, abc.ABC):
    """A kernel [out, in] that other tensors hold.

    Attributes:
      parts: The tensors that hold it, by the ends of their names.
      packing: How they do.
    """

    parts: Mapping[str, StoredTensor] = dataclasses.field(repr=False)
    packing: Packing

    ends: ClassVar[tuple[str, ...]]
    """Ends of the names of the tensors that replace the kernel; the first one identifies it."""

    required: ClassVar[tuple[str, ...]]
    """Those that every kernel has."""

    @classmethod
    def make(cls, name: str, parts: Mapping[str, StoredTensor], packing: Packing) -> "PackedKernel":
        """Returns the kernel `name`.

        Raises:
          ValueError: The tensors do not fit each other; the message names one.
        """
        shape = cls.find_shape(parts, packing)
        size = sum(part.nbytes for part in parts.values())
        file = parts[cls.ends[0]].file
        return cls(
            file=file,
            name=name,
            dtype="F32",
            shape=shape,
            start=0,
            nbytes=size,
            parts=parts,
            packing=packing,
        )

    @classmethod
    @abc.abstractmethod
    def find_shape(cls, parts: Mapping[str, StoredTensor], packing: Packing) -> tuple[int, int]:
        """Returns (out, in), after checking the tensors.

        Raises:
          ValueError: The tensors do not fit each other.
        """

    @abc.abstractmethod
    def unpack(self, outputs: Range, inputs: Range) -> Float32[np.ndarray, "outputs inputs"]:
        """Returns a range of the values. `outputs` starts at a multiple of 128."""

    def pieces(
        self,
        rows: slice | None = None,
        columns: slice | None = None,
        dtype: np.dtype | None = None,
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Unpacks a range of the kernel, in pieces; see `StoredTensor.pieces`."""
        del dtype
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        left, right, _ = (columns or slice(None)).indices(self.shape[1])
        step = max(1, _AT_ONCE // max(right - left, 1) // _STEP) * _STEP
        for begin in range(first - first % _STEP, last, step):
            end = min(begin + step, last)
            values = self.unpack((begin, end), (left, right))
            yield slice(max(begin, first), end), values[max(first - begin, 0) :]


def read_part(
    tensor: StoredTensor, dtype: Any, rows: Range | None = None, columns: Range | None = None
) -> np.ndarray:
    """Reads a range of a stored tensor."""
    pieces = tensor.pieces(
        None if rows is None else slice(*rows),
        None if columns is None else slice(*columns),
        np.dtype(dtype),
    )
    found = [values for _, values in pieces]
    return found[0] if len(found) == 1 else np.concatenate(found)


def check_part(tensor: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a tensor has one of some dtypes, and a shape."""
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{tensor.name} in {tensor.file} has the dtype {tensor.dtype}, but must have"
            f" {' or '.join(dtypes)}"
        )
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.name} in {tensor.file} has the shape {list(tensor.shape)}, but must have"
            f" {list(shape)}"
        )
