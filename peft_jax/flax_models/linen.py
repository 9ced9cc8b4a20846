"""Adapts Linen modules by intercepting the calls of their layers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax.core import meta, unfreeze

from peft_jax.core import Path, Tree, flatten, unflatten
from peft_jax.flax_models.bound_kernel import BoundKernel
from peft_jax.flax_models.layers import Layer
from peft_jax.flax_models.model import FlaxModel, Submodule, describe_leaves
from peft_jax.flax_models.tracing import abstract_call

Layers = Mapping[type, Layer]

_PARAMS = "params"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LinenModel(FlaxModel):
    """A user's Linen module; see `FlaxModel`.

    Attributes:
      module: The user's module, which is never changed.
      layers: Kinds of layers that can be adapted.
      collections: The module's variables besides "params", such as "batch_stats".
    """

    module: nn.Module
    layers: Layers
    collections: Mapping[str, Any]

    def __call__(
        self,
        params: Tree,
        *args: Any,
        collections: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns what the module's `apply` returns.

        Args:
          params: Parameters in this library's form, with adapters bound or not.
          *args: Arguments of `apply` after the variables.
          collections: Variables besides "params". Default: those given to `adapt`.
          **kwargs: Keyword arguments of `apply`, such as `rngs`, `mutable` and `method`.
        """
        others = self.collections if collections is None else collections
        variables = {_PARAMS: unflatten(self._restore(params)), **others}
        with nn.intercept_methods(functools.partial(_intercept, self.layers)):
            return self.module.apply(variables, *args, **kwargs)

    def from_flax(self, given: Mapping[str, Any]) -> Tree:
        """Returns variables, as `module.init` returns them, as parameters of this model."""
        return self._matrices(flatten(_split(given)[0]))

    def to_flax(self, params: Tree) -> dict[str, Any]:
        """Returns parameters as variables for the module's own `apply`.

        Args:
          params: Parameters without adapters, such as the result of `spec.merge`.

        Raises:
          ValueError: An adapter is bound.
        """
        return {_PARAMS: unflatten(self._plain(params)), **self.collections}


def adapt_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layers: Layers,
) -> tuple[LinenModel, Tree]:
    """Returns a Linen module as a model, and its parameters; see `adapt`."""
    params, collections = _split(variables)
    calls: dict[Path, Submodule] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        path = tuple(context.module.path)
        layer = _layer_of(layers, context)
        if layer is not None and context.module.has_variable(_PARAMS, layer.kernel):
            kernel: Any = context.module.get_variable(_PARAMS, layer.kernel)
            calls[path] = Submodule(layer=layer, module=context.module, shape=kernel.shape)
        elif path not in calls:
            calls[path] = Submodule(layer=None, module=context.module)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        abstract_call(module.apply, {_PARAMS: params, **collections}, *args, **kwargs)
    leaves = describe_leaves(flatten(params), calls, "the call that adapt was given")
    model = LinenModel(
        name=type(module).__name__,
        leaves=leaves,
        module=module,
        layers=layers,
        collections=collections,
    )
    return model, model.from_flax(variables)


def _intercept(
    layers: Layers,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Computes a layer whose kernel is adapted, and calls all other methods."""
    layer, module = _layer_of(layers, context), context.module
    if layer is None or not module.has_variable(_PARAMS, layer.kernel):
        return next_fun(*args, **kwargs)
    bound: Any = module.get_variable(_PARAMS, layer.kernel)
    if not isinstance(bound, BoundKernel):
        return next_fun(*args, **kwargs)
    bias: Any = module.get_variable(_PARAMS, "bias")
    return layer.call(context.method_name, module, bound, bias, *args, **kwargs)


def _layer_of(layers: Layers, context: nn.module.InterceptorContext) -> Layer | None:
    """Returns the kind of layer whose own method is called, also by `super()` of a subclass."""
    called = getattr(context.orig_method, "func", None)
    for cls in type(context.module).__mro__:
        layer = layers.get(cls)
        if layer is None:
            continue
        for name in layer.methods:
            method = getattr(cls, name)
            if called in (method, getattr(method, "__wrapped__", None)):
                return layer
    return None


def _split(variables: Mapping[str, Any]) -> tuple[Tree, dict[str, Any]]:
    """Returns parameters and other collections, without the boxes of Flax's partitioning."""
    plain = meta.unbox(unfreeze(dict(variables)))
    if _PARAMS not in plain:
        raise ValueError(
            f"variables have the collections {', '.join(map(str, plain)) or 'nothing'}, but must"
            ' have "params", as module.init returns them'
        )
    params = plain.pop(_PARAMS)
    return params, plain
