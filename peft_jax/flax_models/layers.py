"""Computes Flax's layers with adapted kernels: one class for each kind of layer.

Linen's and NNX's layers have the same attributes under the same names, so that each class here
serves both.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array

from peft_jax.flax_models.bound_kernel import BoundKernel, KernelUseError
from peft_jax.flax_models.equation import Equation
from peft_jax.flax_models.layout import Layout
from peft_jax.flax_models.products import attend, contract, convolve, look_up


class Axes(NamedTuple):
    """Axes of one layer's kernel; see `Layout`."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the layout of a kernel [*stack, *shape]."""
        leading = len(shape) - sum(map(len, self))
        return Layout(**self._asdict(), shape=shape[leading:], stack=shape[:leading])


@dataclasses.dataclass(frozen=True)
class Layer(abc.ABC):
    """A kind of Flax layer.

    Attributes:
      kernel: Name of the layer's kernel among its parameters.
    """

    kernel: str = "kernel"

    methods: ClassVar[tuple[str, ...]] = ("__call__",)
    """Methods of the layer that multiply by the kernel."""

    def fault(self, layer: Any) -> str:
        """Returns why a layer with these settings cannot be adapted; empty if it can."""
        custom = {
            "dot_general": (None, jax.lax.dot_general),
            "dot_general_cls": (None,),
            "einsum_op": (jnp.einsum,),
            "conv_general_dilated": (None, jax.lax.conv_general_dilated),
            "conv_general_dilated_cls": (None,),
            "preferred_element_type": (None,),
            "mask": (None,),
        }
        given = [
            name for name, usual in custom.items() if getattr(layer, name, usual[0]) not in usual
        ]
        return f"its {given[0]} is set, which an adapter would leave out" if given else ""

    @abc.abstractmethod
    def axes(self, layer: Any) -> Axes:
        """Returns the axes of the layer's kernel."""

    @abc.abstractmethod
    def multiply(
        self, layer: Any, bound: BoundKernel, x: Array, base: Array, bias: Array | None
    ) -> Array:
        """Returns the layer's outputs for inputs, base and bias in the dtype of the product."""

    def call(
        self,
        method: str,
        layer: Any,
        bound: BoundKernel,
        bias: Array | None,
        x: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Array:
        """Computes one of `methods` with an adapted kernel.

        Args:
          method: Name of the method.
          layer: The Flax layer.
          bound: Its kernel.
          bias: Its bias, if it has one.
          x: Input of the method.
          *args: Further arguments of the method.
          **kwargs: Further arguments of the method.

        Raises:
          KernelUseError: An argument is not supported.
        """
        del method
        layer = self.with_arguments(layer, bound, *args, **kwargs)
        x, base, bias = _promote(layer, jnp.asarray(x), bound.base, bias)
        with _precision(layer):
            return self.multiply(layer, bound, x, base, bias)

    def with_arguments(self, layer: Any, bound: BoundKernel, *args: Any, **kwargs: Any) -> Any:
        """Returns the layer for one call's further arguments, which are all rejected by default."""
        given = [*args, *(value for value in kwargs.values() if value is not None)]
        if given:
            raise KernelUseError(
                f"{bound.name} is adapted and called with the further arguments {given}, which an"
                " adapted layer does not take; leave it out with exclude_modules"
            )
        return layer


class Dense(Layer):
    """Linen's `Dense` and NNX's `Linear`."""

    def axes(self, layer: Any) -> Axes:
        """Returns [in, out]."""
        del layer
        return Axes((0,), (1,))

    def multiply(
        self, layer: Any, bound: BoundKernel, x: Array, base: Array, bias: Array | None
    ) -> Array:
        """Returns x W + b."""
        del layer
        y = contract(x, bound, base, (x.ndim - 1,))
        return y if bias is None else y + bias


class DenseGeneral(Layer):
    """Linen's `DenseGeneral` and NNX's `LinearGeneral`."""

    def axes(self, layer: Any) -> Axes:
        """Returns [*batch, *in, *out]."""
        ends = [len(self._batch(layer))]
        for names in (("axis",), ("features", "out_features")):
            value = next(getattr(layer, name) for name in names if hasattr(layer, name))
            ends.append(ends[-1] + len(as_tuple(value)))
        batch, inputs, outputs = ends
        return Axes(tuple(range(batch, inputs)), tuple(range(inputs, outputs)), tuple(range(batch)))

    def multiply(
        self, layer: Any, bound: BoundKernel, x: Array, base: Array, bias: Array | None
    ) -> Array:
        """Returns the contraction over the layer's axes, and adds b [*batch, *out]."""
        # Flax sorts the axes, whatever their order in the settings.
        axes = sorted(axis % x.ndim for axis in as_tuple(layer.axis))
        batch = sorted(axis % x.ndim for axis in self._batch(layer))
        y = contract(x, bound, base, axes, batch)
        if bias is None:
            return y
        layout = bound.layout
        free = y.ndim - len(layout.batch) - len(layout.outputs)
        sizes = (*layout.sizes(layout.batch), *(1,) * free, *layout.sizes(layout.outputs))
        return y + bias.reshape(sizes)

    def _batch(self, layer: Any) -> tuple[int, ...]:
        names = ("batch_dims", "batch_axis")
        return as_tuple(next(getattr(layer, name) for name in names if hasattr(layer, name)))


@dataclasses.dataclass(frozen=True)
class Einsum(Layer):
    """Linen's and NNX's `Einsum`, and layers of one's own that compute an einsum of x and W.

    Attributes:
      kernel: Name of the layer's kernel.
      equation: Name of the layer's attribute with the equation.
    """

    equation: str = "einsum_str"

    def fault(self, layer: Any) -> str:
        """Returns why the equation is not a product with a matrix."""
        try:
            self.axes(layer)
        except ValueError as error:
            return str(error)
        return super().fault(layer)

    def axes(self, layer: Any) -> Axes:
        """Returns the axes by the letters of the equation."""
        text = getattr(layer, self.equation)
        if not isinstance(text, str):
            raise ValueError("its equation is given at the call")
        equation = Equation.parse(text)
        return Axes(equation.inputs, equation.outputs, equation.batch)

    def multiply(
        self, layer: Any, bound: BoundKernel, x: Array, base: Array, bias: Array | None
    ) -> Array:
        """Returns the einsum, and adds b to the kernel's letters of the result."""
        equation = Equation.parse(getattr(layer, self.equation)).expand(x.ndim)
        y = contract(x, bound, base, equation.contracted, equation.batched)
        y = jnp.transpose(y, equation.order)
        if bias is None:
            return y
        return y + bias.reshape(
            [
                size if letter in equation.kernel else 1
                for letter, size in zip(equation.result, y.shape, strict=True)
            ]
        )

    def with_arguments(self, layer: Any, bound: BoundKernel, *args: Any, **kwargs: Any) -> Any:
        """Rejects an equation of the call, for which the kernel would be another matrix."""
        own = getattr(layer, self.equation)
        if args and args[0] in (None, own):
            args = args[1:]
        kwargs = {name: value for name, value in kwargs.items() if value != own}
        return super().with_arguments(layer, bound, *args, **kwargs)


class Conv(Layer):
    """Linen's and NNX's `Conv`."""

    def fault(self, layer: Any) -> str:
        """Rejects grouped convolutions beside what other layers reject."""
        if layer.feature_group_count != 1:
            return f"it convolves {layer.feature_group_count} groups of features each by itself"
        return super().fault(layer)

    def axes(self, layer: Any) -> Axes:
        """Returns [*window, in, out], whose matrix is [prod(window) * in, out]."""
        window = len(as_tuple(layer.kernel_size))
        return Axes(tuple(range(window + 1)), (window + 1,))

    def multiply(
        self, layer: Any, bound: BoundKernel, x: Array, base: Array, bias: Array | None
    ) -> Array:
        """Returns the convolution, and adds b."""
        y = convolve(layer, x, bound, base)
        return y if bias is None else y + bias


@dataclasses.dataclass(frozen=True)
class Embed(Layer):
    """Linen's and NNX's `Embed`."""

    kernel: str = "embedding"

    methods: ClassVar[tuple[str, ...]] = ("__call__", "attend")

    def fault(self, layer: Any) -> str:
        """Rejects a table of one row, which Flax gives out for every number."""
        return "it has one row" if layer.num_embeddings == 1 else super().fault(layer)

    def axes(self, layer: Any) -> Axes:
        """Returns [rows, features]."""
        del layer
        return Axes((0,), (1,))

    def call(
        self,
        method: str,
        layer: Any,
        bound: BoundKernel,
        bias: Array | None,
        x: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Array:
        """Looks up rows, or multiplies by them."""
        if method == "attend":
            return super().call(method, layer, bound, bias, x, *args, **kwargs)
        self.with_arguments(layer, bound, *args, **kwargs)
        (base,) = _promote(layer, bound.base, inexact=False)
        return look_up(jnp.asarray(x), bound, base)

    def multiply(
        self, layer: Any, bound: BoundKernel, x: Array, base: Array, bias: Array | None
    ) -> Array:
        """Returns the products with the rows."""
        del layer, bias
        return attend(x, bound, base)


LAYERS: Mapping[type, Layer] = {
    nn.Dense: Dense(),
    nn.DenseGeneral: DenseGeneral(),
    nn.Einsum: Einsum(),
    nn.Conv: Conv(),
    nn.Embed: Embed(),
    nnx.Linear: Dense(),
    nnx.LinearGeneral: DenseGeneral(),
    nnx.Einsum: Einsum(),
    nnx.Conv: Conv(),
    nnx.Embed: Embed(),
}
"""Layers of Flax that can be adapted, by their classes."""


def _promote(layer: Any, *arrays: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Returns arrays in the dtype in which the layer computes.

    Args:
      layer: The layer.
      *arrays: Inputs, base and bias, as many as the layer promotes together.
      **kwargs: Further arguments of `promote_dtype`.
    """
    promote = getattr(layer, "promote_dtype", None)
    if promote is None:  # A layer of one's own; `jnp.einsum` promotes like this.
        return tuple(promote_dtype(*arrays))
    if isinstance(layer, nn.Module):
        return tuple(promote(*arrays, dtype=layer.dtype, **kwargs))
    return tuple(promote(arrays, dtype=layer.dtype, **kwargs))


def _precision(layer: Any) -> AbstractContextManager[Any]:
    """Returns a context with the layer's precision of products."""
    precision = getattr(layer, "precision", None)
    if precision is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(jax.lax.Precision(precision).name.lower())


def as_tuple(value: Any) -> tuple[int, ...]:
    """Returns a number, or numbers, as a tuple."""
    return (value,) if isinstance(value, int) else tuple(value)
