"""Carries an adapted kernel to the Flax layer that multiplies by it.

It takes the place of the kernel among the variables of a user's module. It is a pytree, so that
Flax's transformations slice it as they slice the kernel.
"""

import dataclasses
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int32

from peft_jax.core import AdaptedKernel
from peft_jax.flax_models.layout import Layout


class KernelUseError(ValueError, AttributeError):
    """Raised where code that cannot multiply by an adapted kernel uses one.

    It is an `AttributeError` too, because Python asks objects for attributes that may be missing.
    """


@struct.dataclass
class BoundKernel:
    """An adapted kernel among the variables of a Flax module; a pytree.

    Attributes:
      base: Base kernel [*stack, *shape]. Flax compares the first leaf's shape with the layer's.
      adapters: The `AdaptedKernel`, without its innermost base; arrays [*stack, ...].
      layers: Numbers of the layers, int32 [*stack]. Slicing along another axis than the first fails
        with them, so that no adapter is sliced along its own axes.
      name: Name of the module; static.
      layout: How the base is a matrix; static.
    """

    base: Array
    adapters: AdaptedKernel
    layers: Int32[Array, "..."]
    name: str = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False)

    @classmethod
    def create(cls, kernel: AdaptedKernel, name: str, layout: Layout) -> "BoundKernel":
        """Returns a kernel of the library's form in the form of the layer.

        Args:
          kernel: Adapted kernel, over the matrices of `layout`.
          name: Name of the module.
          layout: How the layer's kernel is a matrix.
        """
        base, adapters = _take_base(kernel)
        return cls(
            base=layout.restore(base),
            adapters=jax.tree.map(layout.split, adapters),
            layers=jnp.arange(math.prod(layout.stack), dtype=jnp.int32).reshape(layout.stack),
            name=name,
            layout=layout,
        )

    def kernel(self, base: Array) -> AdaptedKernel:
        """Returns the kernel of one layer: a matrix, or stacked along the batch axes.

        Args:
          base: The base kernel of the layer [*shape], in the dtype of the product.

        Raises:
          KernelUseError: The layer still has stacked kernels.
        """
        if self.base.shape != self.layout.shape:
            raise KernelUseError(
                f"{self.name} is called with kernels {list(self.base.shape)}, but is adapted as a"
                f" stack of kernels {list(self.layout.shape)}; call it under nn.scan or nn.vmap,"
                " which slice its variables along their first axis"
            )
        return _put_base(self.adapters, self.layout.one.matrices(base))

    def __jax_array__(self) -> NoReturn:
        self._refuse()

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        self._refuse()

    def _refuse(self, *_: Any) -> NoReturn:
        raise KernelUseError(
            f"{self.name} is adapted, but its kernel is used by code other than the Flax layer that"
            " holds it, which would leave out the adapter; leave the module out with"
            " exclude_modules, or train it in full with modules_to_save"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __neg__ = __getitem__ = __iter__ = __len__ = _refuse


def _take_base(kernel: AdaptedKernel) -> tuple[Array, AdaptedKernel]:
    if isinstance(kernel.base, AdaptedKernel):
        base, inner = _take_base(kernel.base)
        return base, dataclasses.replace(kernel, base=inner)
    return kernel.base, dataclasses.replace(kernel, base=None)


def _put_base(adapters: AdaptedKernel, base: Array) -> AdaptedKernel:
    inner = adapters.base
    whole = base if inner is None else _put_base(inner, base)
    return dataclasses.replace(adapters, base=whole)
