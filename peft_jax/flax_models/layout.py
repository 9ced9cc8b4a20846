"""Describes how the kernel of a Flax layer is a matrix, or a stack of matrices."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Axes of a kernel that form the rows and columns of its matrix [d_in, d_out].

    Attributes:
      shape: Shape of one layer's kernel.
      inputs: Axes that are contracted with the layer's input, in the order of the matrix's rows.
      outputs: Axes of the layer's output, in the order of the matrix's columns.
      batch: Axes along which the layer has a matrix each.
      stack: Sizes of the leading axes over layers, which `shape` does not have.

    Example:
      >>> layout = Layout(shape=(8, 2, 4), inputs=(0,), outputs=(1, 2), stack=(3,))
      >>> matrices = layout.matrices(jnp.ones((3, 8, 2, 4)))
      >>> matrices.shape, layout.restore(matrices).shape
      ((3, 8, 8), (3, 8, 2, 4))
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

    @property
    def one(self) -> "Layout":
        """Layout of one layer of the stack."""
        return dataclasses.replace(self, stack=())

    @property
    def has_stack(self) -> bool:
        """Whether there are several matrices."""
        return bool(self.stack or self.batch)

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of some axes of one layer's kernel."""
        return tuple(self.shape[axis] for axis in axes)

    def matrices(self, kernel: Array) -> Array:
        """Returns [d_in, d_out], or [matrices, d_in, d_out] of the stack and the batch axes.

        Args:
          kernel: Kernel [*stack, *shape].
        """
        kernel = jnp.transpose(kernel, self._order)
        matrix = (math.prod(self.sizes(self.inputs)), math.prod(self.sizes(self.outputs)))
        return kernel.reshape((-1, *matrix) if self.has_stack else matrix)

    def restore(self, matrices: Array) -> Array:
        """Returns the kernel [*stack, *shape] of its matrices; inverse of `matrices`."""
        sizes = self.sizes((*self.batch, *self.inputs, *self.outputs))
        order = self._order
        back = tuple(order.index(axis) for axis in range(len(order)))
        return jnp.transpose(matrices.reshape((*self.stack, *sizes)), back)

    def split(self, array: Array) -> Array:
        """Splits the leading axis of an adapter's array into [*stack, batch].

        Args:
          array: An array with the leading axis of `matrices`, if that has one.
        """
        if not self.has_stack:
            return array
        batch = (math.prod(self.sizes(self.batch)),) if self.batch else ()
        return array.reshape((*self.stack, *batch, *array.shape[1:]))

    @property
    def _order(self) -> tuple[int, ...]:
        leading = len(self.stack)
        own = (leading + axis for axis in (*self.batch, *self.inputs, *self.outputs))
        return (*range(leading), *own)
