"""Reading any part of a leaf of the parameters from where a checkpoint keeps it."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from peft_jax.hub.finite import check_finite
from peft_jax.hub.tensors import StoredTensor

Ranges = tuple[tuple[int, int], ...]
"""A part of an array: the first index and the one after the last, along each axis."""


@runtime_checkable
class LeafSource(Protocol):
    """Where the numbers of one leaf are."""

    def read_into(self, target: np.ndarray, ranges: Ranges) -> None:
        """Fills `target` with a part of the leaf, converted to its dtype.

        Args:
          target: of the part's shape.
          ranges: which part.

        Raises:
          ValueError: a number is NaN or infinite; the tensor is named.
        """


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf in safetensors: one tensor, or one for each layer.

    Attributes:
      tensors: the tensor; of a stacked leaf, one a layer.
      stacked: whether the leaf has the layers as its leading axis.
      transposed: whether the files have [out, in] where the leaf has [in, out].
    """

    tensors: Sequence[StoredTensor]
    stacked: bool
    transposed: bool

    def read_into(self, target: np.ndarray, ranges: Ranges) -> None:
        """Fills `target` with a part of the leaf; only that part is read, where it is worth it."""
        if not self.stacked:
            self._fill(target, self.tensors[0], ranges)
            return
        for part, layer in zip(target, range(*ranges[0]), strict=True):
            self._fill(part, self.tensors[layer], ranges[1:])

    def _fill(self, target: np.ndarray, tensor: StoredTensor, ranges: Ranges) -> None:
        if self.transposed:
            target, ranges = target.T, ranges[::-1]
        (first, last), *others = ranges
        columns = slice(*others[0]) if others else None
        for rows, values in tensor.pieces(slice(first, last), columns):
            check_finite(values, target.dtype, name=tensor.name, where=str(tensor.file))
            target[rows.start - first : rows.stop - first] = values
