"""Reads ranges of a parameter leaf from a checkpoint."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from peft_jax.hub.finite import check_finite
from peft_jax.hub.tensors import StoredTensor

Ranges = tuple[tuple[int, int], ...]
"""A range of an array: (start, stop) along each axis."""


@runtime_checkable
class LeafSource(Protocol):
    """Source of the values of one leaf."""

    def read_into(self, target: np.ndarray, ranges: Ranges) -> None:
        """Fills `target` with a range of the leaf, converted to the dtype of `target`.

        Args:
          target: Array of the range's shape.
          ranges: Range to read.

        Raises:
          ValueError: A value is NaN or infinite; the message names the tensor.
        """


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf in safetensors.

    Attributes:
      tensors: Tensor of the leaf; one per layer if stacked.
      stacked: Whether the leaf's leading axis is the layer.
      transposed: Whether the files store [out, in] where the leaf is [in, out].
      first: Number of layers before the first tensor's; their rows are zero.
    """

    tensors: Sequence[StoredTensor]
    stacked: bool
    transposed: bool
    first: int = 0

    @property
    def dtypes(self) -> set[str]:
        """Safetensors' names of the stored dtypes."""
        return {tensor.dtype for tensor in self.tensors}

    def read_into(self, target: np.ndarray, ranges: Ranges) -> None:
        """Fills `target` with a range of the leaf; the rest is read only where that is faster."""
        if not self.stacked:
            self._fill(target, self.tensors[0], ranges)
            return
        for part, layer in zip(target, range(*ranges[0]), strict=True):
            if layer < self.first:
                part[...] = 0
            else:
                self._fill(part, self.tensors[layer - self.first], ranges[1:])

    def _fill(self, target: np.ndarray, tensor: StoredTensor, ranges: Ranges) -> None:
        if self.transposed:
            target, ranges = target.T, ranges[::-1]
        _fill(target, tensor, ranges)


@dataclasses.dataclass(frozen=True)
class StoredExperts:
    """Kernels [layers, experts, in, out] of which each expert has tensors of its own, [out, in].

    Attributes:
      tensors: Tensors by layer, expert and part.
      experts: Number of experts.
      joined: Number of parts whose outputs are joined.
    """

    tensors: Sequence[StoredTensor]
    experts: int
    joined: int

    @property
    def dtypes(self) -> set[str]:
        """Safetensors' names of the stored dtypes."""
        return {tensor.dtype for tensor in self.tensors}

    def read_into(self, target: np.ndarray, ranges: Ranges) -> None:
        """Fills `target` with a range of the leaf."""
        layers, experts, rows, columns = ranges
        width = self.tensors[0].shape[0]
        for layer, expert, part in itertools.product(
            range(*layers), range(*experts), range(self.joined)
        ):
            start = max(columns[0], part * width)
            stop = min(columns[1], (part + 1) * width)
            if start < stop:
                own = target[layer - layers[0], expert - experts[0]]
                tensor = self.tensors[(layer * self.experts + expert) * self.joined + part]
                within = (start - part * width, stop - part * width)
                _fill(own[:, start - columns[0] : stop - columns[0]].T, tensor, (within, rows))


def _fill(target: np.ndarray, tensor: StoredTensor, ranges: Ranges) -> None:
    """Fills `target` with a range of a tensor."""
    (first, last), *others = ranges
    columns, further = (slice(*others[0]), others[1:]) if others else (None, [])
    within = (slice(None), slice(None), *(slice(*one) for one in further))
    for rows, values in tensor.pieces(slice(first, last), columns):
        check_finite(values, target.dtype, name=tensor.name, where=str(tensor.file))
        target[rows.start - first : rows.stop - first] = values[within] if further else values
