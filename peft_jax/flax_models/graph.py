"""Adapts NNX modules by replacing their layers in a copy of the graph."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from peft_jax.core import Path, Tree
from peft_jax.flax_models.bound_kernel import BoundKernel
from peft_jax.flax_models.layers import Layer, as_tuple
from peft_jax.flax_models.model import FlaxModel, Submodule, describe_leaves

Layers = Mapping[type, Layer]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NNXModel(FlaxModel):
    """A user's NNX module; see `FlaxModel`.

    Attributes:
      graph: Structure of the module, whose layers multiply by adapted kernels.
      plain_graph: Structure of the module itself.
      slots: Variables of the parameters by path, without values.
      rest: State besides parameters, such as batch statistics and the counts of random keys.
    """

    graph: Any
    plain_graph: Any
    slots: Mapping[tuple[Any, ...], Any]
    rest: Any

    def __call__(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module returns when it is called.

        Each call starts from the non-parameter state that the module had when it was adapted. To
        keep changed state across calls, or to seed random keys, use `bind`.

        Args:
          params: Parameters in this library's form, with adapters bound or not.
          *args: Arguments of the module.
          **kwargs: Keyword arguments of the module.
        """
        return self.bind(params)(*args, **kwargs)

    def bind(self, params: Tree) -> Any:
        """Returns a copy of the module with some parameters, adapted or not.

        Args:
          params: Parameters in this library's form.
        """
        return self._merge(self.graph, self._restore(params))

    def from_flax(self, given: nnx.Module) -> Tree:
        """Returns the parameters of a module of the same structure as parameters of this model."""
        found = nnx.to_flat_state(nnx.state(given, nnx.Param))
        return self._matrices({_names(path): leaf.get_value() for path, leaf in found})

    def to_flax(self, params: Tree) -> Any:
        """Returns a copy of the user's module with some parameters.

        Args:
          params: Parameters without adapters, such as the result of `spec.merge`.

        Raises:
          ValueError: An adapter is bound.
        """
        return self._merge(self.plain_graph, self._plain(params))

    def _merge(self, graph: Any, leaves: Mapping[Path, Any]) -> Any:
        state = [
            (path, variable.replace(leaves[_names(path)])) for path, variable in self.slots.items()
        ]
        # Calls change the state's variables, such as counts of random keys; these are copies.
        rest = jax.tree.map(lambda leaf: leaf, self.rest)
        return nnx.merge(graph, nnx.from_flat_state(state), rest)


def adapt_graph(module: nnx.Module, layers: Layers) -> tuple[NNXModel, Tree]:
    """Returns an NNX module as a model, and its parameters; see `adapt`."""
    plain_graph, state, *others = nnx.split(module, nnx.Param, ...)
    (rest,) = others
    variables = dict(nnx.to_flat_state(state))
    nodes: dict[Path, Submodule] = {}
    copy = nnx.merge(plain_graph, state, rest)
    for path, node in nnx.iter_modules(copy):
        layer = _layer_of(layers, type(node))
        nodes[_names(path)] = Submodule(layer=layer, module=node, shape=_declared_shape(node))
    leaves = describe_leaves(
        {_names(path): variable.get_value() for path, variable in variables.items()},
        nodes,
        "the module's graph",
    )
    for path, site in leaves.sites.items():
        node = nodes[path[:-1]].module
        cls: Any = type(node)
        node.__class__ = _adaptable(cls, site.layer)
    model = NNXModel(
        name=type(module).__name__,
        leaves=leaves,
        graph=nnx.graphdef(copy),
        plain_graph=plain_graph,
        slots={path: variable.replace(None) for path, variable in variables.items()},
        rest=rest,
    )
    return model, model.from_flax(module)


@functools.cache
def _adaptable(cls: Any, layer: Layer) -> Any:
    """Returns a subclass of a layer that multiplies by adapted kernels too."""

    def replace(name: str) -> Any:
        own = getattr(cls, name)

        @functools.wraps(own)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = getattr(self, layer.kernel).get_value()
            if not isinstance(bound, BoundKernel):
                return own(self, *args, **kwargs)
            bias = getattr(self, "bias", None)
            bias = None if bias is None else bias.get_value()
            return layer.call(name, self, bound, bias, *args, **kwargs)

        return method

    return type(cls.__name__, (cls,), {name: replace(name) for name in layer.methods})


def _layer_of(layers: Layers, cls: type) -> Layer | None:
    """Returns the kind of a class of layers, unless it overrides the methods."""
    for base in cls.__mro__:
        layer = layers.get(base)
        if layer is not None:
            own = all(getattr(cls, name) is getattr(base, name) for name in layer.methods)
            return layer if own else None
    return None


def _declared_shape(node: Any) -> tuple[int, ...] | None:
    """Returns the shape of a layer's kernel as it was declared, without axes over layers."""
    if hasattr(node, "kernel_shape"):
        return tuple(node.kernel_shape)
    if hasattr(node, "num_embeddings"):
        return (node.num_embeddings, node.features)
    if isinstance(node, (nnx.Linear, nnx.LinearGeneral)):
        batch = getattr(node, "batch_axis", {}).values()
        return (*batch, *as_tuple(node.in_features), *as_tuple(node.out_features))
    return None


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(map(str, path))
