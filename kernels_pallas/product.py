"""Differentiable products of activations and parameters, in one implementation per platform.

This is what the operations share: choosing an implementation, running it on each device's shard,
and the rule that makes a forward and a backward kernel differentiable. The formulas, forward and
backward, are in the operations' own folders.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from kernels_pallas.dispatch import Operation, log_requested_xla, resolve
from kernels_pallas.layout import call_per_shard


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Product:
    """A product of rows of activations with parameters.

    Every implementation is a module with two functions:

        forward(x, *parameters, precision=...) -> (y,)
        backward(x, g, *parameters, precision=...) -> (dx, *dparameters)

    where g is the gradient of y. The functions of Pallas modules also take `interpret`.

    Attributes:
      name: Name in the log and in a program's text.
      xla: Implementation that runs anywhere.
      tpu: Name of the module of Pallas kernels for TPUs. It is imported when a kernel is lowered or
        interpreted, so programs for other platforms do not import Pallas.
      gpu: Name of the module of Pallas kernels for GPUs, if there is one.
      unsupported: Returns why a kernel cannot run, or None if it can. Takes the kernel's platform,
        the shapes of x and the parameters, and the keywords `backward` and `precision`.
      feature_axes: For each parameter, the axis that runs along the blocks of features, or None.
    """

    name: str
    xla: ModuleType
    tpu: str
    gpu: str | None = None
    unsupported: Callable[..., str | None]
    feature_axes: tuple[int | None, ...]

    def __call__(
        self,
        x: jax.Array,
        *parameters: jax.Array,
        blocks: int,
        precision: jax.lax.Precision | None,
        implementation: str | None,
    ) -> jax.Array:
        """Returns the product, with the shape and dtype of `x`.

        Args:
          x: Activations [..., features].
          parameters: Parameters of the product.
          blocks: Number of independent blocks of features.
          precision: Precision of the matrix products.
          implementation: One of `kernels_pallas.dispatch.IMPLEMENTATIONS`, or None for the default
            (`kernels_pallas.dispatch.use_implementation`). "xla" keeps JAX's own derivatives, of
            any order. The others can be differentiated once, in reverse mode.

        Raises:
          KernelError: While lowering, if the requested implementation cannot run.
        """
        chosen = resolve(implementation)
        if chosen == "xla":
            log_requested_xla(self.name, x, *parameters)
            return self.xla.forward(x, *parameters, precision=precision)[0]
        return call_per_shard(
            functools.partial(_multiply, self, precision, chosen),
            x,
            *parameters,
            blocks=blocks,
            feature_axes=self.feature_axes,
            implementation=chosen,
        )

    @functools.cached_property
    def forward(self) -> Operation:
        """Maps (x, *parameters) to (y,)."""
        return Operation(
            name=self.name,
            xla=self.xla.forward,
            tpu=_lazy(self.tpu, "forward"),
            gpu=_lazy(self.gpu, "forward"),
            unsupported=functools.partial(self.unsupported, backward=False),
            rowwise=(0,),
        )

    @functools.cached_property
    def backward(self) -> Operation:
        """Maps (x, g, *parameters) to (dx, *dparameters)."""

        def unsupported(platform: str, x: Any, g: Any, *parameters: Any, **settings: Any) -> Any:
            del g
            return self.unsupported(platform, x, *parameters, backward=True, **settings)

        return Operation(
            name=f"{self.name}_backward",
            xla=self.xla.backward,
            tpu=_lazy(self.tpu, "backward"),
            gpu=_lazy(self.gpu, "backward"),
            unsupported=unsupported,
        )


def _lazy(module: str | None, function: str) -> Callable[..., tuple[jax.Array, ...]] | None:
    """Returns a function that imports its module when called; None without a module."""
    if module is None:
        return None

    def call(*arrays: jax.Array, **settings: Any) -> tuple[jax.Array, ...]:
        return getattr(importlib.import_module(module), function)(*arrays, **settings)

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(
    product: Product,
    precision: jax.lax.Precision | None,
    implementation: str,
    x: jax.Array,
    *parameters: jax.Array,
) -> jax.Array:
    return product.forward(x, *parameters, precision=precision, implementation=implementation)[0]


def _multiply_forward(
    product: Product, precision: Any, implementation: str, *arrays: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    # Only the inputs are kept. The backward kernels recompute intermediate values on the chip.
    return _multiply(product, precision, implementation, *arrays), arrays


def _multiply_backward(
    product: Product, precision: Any, implementation: str, residuals: Any, g: jax.Array
) -> tuple[jax.Array, ...]:
    x, *parameters = residuals
    return product.backward(x, g, *parameters, precision=precision, implementation=implementation)


_multiply.defvjp(_multiply_forward, _multiply_backward)
