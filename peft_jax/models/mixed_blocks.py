"""Stacks the parameters of blocks of several forms, such as layers with and without experts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peft_jax.models.layer_types import Segment


class MixedBlocks(nnx.Module):
    """Stacked parameters of blocks of several forms.

    A parameter is stacked over the layers that have it, in their order. Its metadata `layers` lists
    them, and is empty if these are all. Forms may share parameters, which have equal shapes then.

    Args:
      makes: Makes one block of each form, by the form's name.
      forms: Name of each layer's form.
    """

    def __init__(self, makes: Mapping[str, Callable[[], nnx.Module]], forms: Sequence[str]):
        self.forms, self.names = tuple(forms), tuple(dict.fromkeys(forms))
        blocks = [nnx.split(makes[form]()) for form in self.names]
        self.structures = tuple(structure for structure, _ in blocks)
        flat = [dict(nnx.to_flat_state(state)) for _, state in blocks]
        self.paths = tuple(frozenset(own) for own in flat)
        for path, variable in {path: one for own in flat for path, one in own.items()}.items():
            having = {form for form, own in zip(self.names, flat, strict=True) if path in own}
            layers = tuple(layer for layer, form in enumerate(forms) if form in having)
            value = variable.get_value()
            stacked = variable.replace(jnp.zeros((len(layers), *value.shape), value.dtype))
            stacked.set_metadata(layers=layers if len(layers) < len(forms) else ())
            _set_at(self, path, stacked)

    def block(self, layer: int, state: Any) -> nnx.Module:
        """Returns one layer's block.

        Args:
          layer: Number of the layer, or of another one of the same form.
          state: Parameters of the layer. Those that it does not have are ignored.
        """
        form = self.names.index(self.forms[layer])
        own = {path: one for path, one in nnx.to_flat_state(state) if path in self.paths[form]}
        return nnx.merge(self.structures[form], nnx.from_flat_state(own))


class _Group(nnx.Module):
    """The parameters of one module of a block."""


def _set_at(module: nnx.Module, path: tuple[Any, ...], variable: nnx.Variable) -> None:
    for name in path[:-1]:
        if not hasattr(module, name):
            setattr(module, name, _Group())
        module = getattr(module, name)
    setattr(module, path[-1], variable)


def layers_of_leaves(stacked: Any) -> list[tuple[int, ...]]:
    """Returns the layers that each array of stacked parameters has rows for; () for all."""
    variables = jax.tree.leaves(stacked, is_leaf=lambda node: isinstance(node, nnx.Variable))
    # Arrays that are no parameters, such as keys of virtual tokens, belong to all layers.
    return [getattr(one, "layers", ()) for one in variables for _ in jax.tree.leaves(one)]


def rows_in(layers: tuple[int, ...], segment: Segment) -> tuple[int, tuple[int | None, ...]]:
    """Returns where the layers of a segment are among the rows of a leaf.

    Args:
      layers: Layers that the leaf has rows for; () for all.
      segment: Layers that repeat a period of forms.

    Returns:
      Number of rows before the segment, and for each layer of a period its row among those of the
      period; None if the leaf has none.

    Example:
      >>> rows_in((), Segment(start=4, period=2, repeats=3))
      (4, (0, 1))
      >>> rows_in((1, 5, 7, 9), Segment(start=4, period=2, repeats=3))
      (1, (None, 0))
    """
    if not layers:
        return segment.start, tuple(range(segment.period))
    rows = iter(range(segment.period))
    period = range(segment.start, segment.start + segment.period)
    before = sum(layer < segment.start for layer in layers)
    return before, tuple(next(rows) if layer in layers else None for layer in period)
