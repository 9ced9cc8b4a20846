"""Makes a model of a user's Flax module."""

from collections.abc import Mapping
from typing import Any, overload

import flax.linen as nn
import jax
from flax import nnx

from peft_jax.adapters import AdapterSpec
from peft_jax.core import Tree, flatten, join_path
from peft_jax.flax_models.bound_kernel import KernelUseError
from peft_jax.flax_models.graph import NNXModel, adapt_graph
from peft_jax.flax_models.layers import LAYERS, Layer
from peft_jax.flax_models.linen import LinenModel, adapt_linen
from peft_jax.flax_models.model import FlaxModel
from peft_jax.flax_models.tracing import abstract_call


@overload
def adapt(
    module: nn.Module,
    spec: AdapterSpec | None,
    *args: Any,
    layers: Mapping[type, Layer] | None = None,
    **kwargs: Any,
) -> tuple[LinenModel, Tree]: ...
@overload
def adapt(
    module: nnx.Module,
    spec: AdapterSpec | None,
    *args: Any,
    layers: Mapping[type, Layer] | None = None,
    **kwargs: Any,
) -> tuple[NNXModel, Tree]: ...
def adapt(
    module: nn.Module | nnx.Module,
    spec: AdapterSpec | None,
    *args: Any,
    layers: Mapping[type, Layer] | None = None,
    **kwargs: Any,
) -> tuple[FlaxModel, Tree]:
    """Makes a model of a user's Flax module, whose code stays as it is.

    The model and its parameters serve all functions of this library that take a model of its own:
    `spec.init`, `spec.bind` and `spec.merge`, `Trainer` with a `loss_fn`, `save_adapter` and
    `load_adapter`, `bind_adapters` and so on. Layers that can be adapted are Linen's `Dense`,
    `DenseGeneral`, `Einsum`, `Conv` and `Embed`, and NNX's `Linear`, `LinearGeneral`, `Einsum`,
    `Conv` and `Embed`, also under `nn.scan`, `nn.vmap`, `nnx.scan` and the like. An `Embed` takes
    low-rank methods, and is adapted where target_modules names it.

    Args:
      module: Linen or NNX module.
      spec: Adapter specification to check against the module; None checks nothing.
      *args: For a Linen module, the arguments of `module.apply`: its variables, and inputs, of
        which shapes suffice. For an NNX module, inputs with which to check `spec`, or nothing.
      layers: Further classes of layers. `Einsum("w", "equation")` is a layer that computes
        `jnp.einsum(self.equation, x, self.w)`.
      **kwargs: Keyword arguments of the call.

    Returns:
      The model, and its parameters: see `FlaxModel`. `model(params, *args)` calls the module, and
      `model.to_flax` returns merged parameters to code of one's own, as variables of a Linen module
      or as an NNX module.

    Raises:
      ValueError: A target matches no module, or a module that is to be adapted multiplies by its
        kernel in code of its own; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> from peft_jax.adapters import LoRA
      >>> module = nn.Dense(3)
      >>> variables = module.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> spec = AdapterSpec(LoRA(rank=2))
      >>> model, params = adapt(module, spec, variables, jnp.ones((2, 4)))
      >>> state = spec.init(jax.random.key(1), params)
      >>> model(spec.bind(params, state), jnp.ones((2, 4))).shape
      (2, 3)
      >>> merged = model.to_flax(spec.merge(params, state))
      >>> module.apply(merged, jnp.ones((2, 4))).shape
      (2, 3)
    """
    known = {**LAYERS, **(layers or {})}
    model: FlaxModel
    if isinstance(module, nn.Module):
        if len(args) < 2 or not isinstance(args[0], Mapping):
            raise ValueError(
                "a Linen module needs its variables and inputs, as module.apply takes them:"
                " adapt(module, spec, variables, inputs)"
            )
        variables, *inputs = args
        model, params = adapt_linen(module, variables, tuple(inputs), kwargs, known)
    elif isinstance(module, nnx.Module):
        inputs = list(args)
        model, params = adapt_graph(module, known)
    else:
        raise ValueError(f"module must be a Linen or an NNX module, but is {module!r}")
    if spec is not None:
        model.check_targets(spec.targets(params).adapted)
        if inputs or kwargs:
            _check_call(model, spec, params, inputs, kwargs)
    return model, params


def _check_call(
    model: FlaxModel, spec: AdapterSpec, params: Tree, inputs: list[Any], kwargs: Mapping[str, Any]
) -> None:
    """Calls the adapted module abstractly.

    Raises:
      KernelUseError: The module cannot be called with the adapters of `spec`.
    """
    bound = jax.eval_shape(spec.bind, params, spec.abstract(params))
    try:
        abstract_call(model, bound, *inputs, **kwargs)
    except KernelUseError:
        raise
    except (IndexError, ValueError) as error:
        # Flax slices the adapters with their kernels. The numbers of the layers have one axis.
        flat = flatten(params)
        adapted = spec.targets(params).adapted
        stacked = [join_path(path[:-1]) for path in adapted if flat[path].ndim > 2]
        if not stacked:
            raise
        raise KernelUseError(
            f"the module cannot be called with {', '.join(stacked)} adapted ({error}); kernels that"
            " are stacked along another axis than the first, as with variable_axes={'params': 1},"
            " cannot be adapted"
        ) from error
