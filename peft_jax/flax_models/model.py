"""Presents a user's Flax module as a model of this library."""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from peft_jax.core import TABLE, AdaptedKernel, Path, Tree, flatten, join_path, unflatten
from peft_jax.core.trees import STACKED
from peft_jax.flax_models.bound_kernel import BoundKernel, KernelUseError
from peft_jax.flax_models.layers import Layer
from peft_jax.flax_models.layout import Layout
from peft_jax.models import ExecutionSettings, HFTensor, TrainableModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A kernel of a Flax layer that can be adapted.

    Attributes:
      layer: Kind of the layer.
      layout: How the kernel is a matrix.
    """

    layer: Layer
    layout: Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submodule:
    """A submodule of a user's module.

    Attributes:
      layer: Kind of the submodule; None if it is no layer that can be adapted.
      module: The submodule, for its settings.
      shape: Shape of one layer's kernel, without axes over layers; None if unknown.
    """

    layer: Layer | None
    module: Any
    shape: tuple[int, ...] | None = None


_OTHER_AXIS = (
    "its kernels are stacked along another axis than the first, as with variable_axes={'params': 1}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaves:
    """Leaves of a Flax module, by the module's own paths.

    Attributes:
      shapes: Shapes of all leaves.
      sites: Kernels that can be adapted.
      faults: Why other leaves called "kernel" or "embedding" cannot be adapted.
    """

    shapes: Mapping[Path, jax.ShapeDtypeStruct]
    sites: Mapping[Path, Site]
    faults: Mapping[Path, str]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FlaxModel(TrainableModel):
    """A user's Flax module, as a function of parameters in this library's form.

    `pj.adapt` makes it. Parameters have the module's own names. Kernels of the layers that can be
    adapted are matrices [d_in, d_out], or stacked [matrices, d_in, d_out], and tables of embeddings
    are called "table". All other leaves are the module's own arrays.

    Attributes:
      name: Name of the module's class.
      leaves: Leaves of the module.
      execution: Execution settings; a module of one's own decides itself.
      origin: Empty, because the parameters' origin is not known.
    """

    name: str
    leaves: Leaves
    execution: ExecutionSettings = dataclasses.field(default_factory=ExecutionSettings)
    origin: str = ""

    @property
    def model_type(self) -> str:
        """The module's class, as files of adapters have it."""
        return f"Flax module {self.name}"

    @property
    def num_layers(self) -> int:
        """Zero: layers have numbers only where the module's names do."""
        return 0

    @abc.abstractmethod
    def __call__(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
        """Calls the module.

        Args:
          params: Parameters in this library's form, with adapters bound or not.
          *args: Arguments of the module.
          **kwargs: Arguments of the module.

        Raises:
          KernelUseError: An adapted kernel is used by code that does not multiply by it through a
            layer of Flax; the message names the module.
        """

    @abc.abstractmethod
    def from_flax(self, given: Any) -> Tree:
        """Returns a Linen module's variables, or an NNX module, as parameters of this model."""

    @abc.abstractmethod
    def to_flax(self, params: Tree) -> Any:
        """Returns parameters as variables for a Linen module, or as an NNX module.

        Args:
          params: Parameters without adapters, such as the result of `spec.merge`.

        Raises:
          ValueError: An adapter is bound.
        """

    def abstract_params(
        self, dtype: Any = None, quantization: str = "none", platform: str = ""
    ) -> Tree:
        """Returns the shapes of all parameters in this library's form."""
        del platform
        if quantization != "none":
            raise ValueError(f"quantization is {quantization!r}, but Flax modules need 'none'")
        if dtype is None:
            return self._shapes
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), self._shapes)

    def logical_axes(self, quantization: str = "none") -> Tree:
        """Returns axes without names: all parameters are replicated over a mesh."""
        shapes = flatten(self.abstract_params(quantization=quantization))
        return unflatten({path: (None,) * leaf.ndim for path, leaf in shapes.items()})

    def shardable_sizes(self) -> dict[str, int]:
        """Returns nothing, because no axis is sharded."""
        return {}

    def hf_names(self) -> dict[Path, HFTensor]:
        """Returns the tensors of leaves that are trained in full: their own names."""
        return {
            path: HFTensor(template=join_path(path), transposed=False)
            for path in flatten(self.abstract_params())
        }

    def module_name(self, path: Path, layer: int | None = None) -> str:
        """Returns the dotted name of the module that holds the leaf at `path`."""
        del layer
        return join_path(path[:-1])

    def check_targets(self, paths: Iterable[Path]) -> None:
        """Raises KernelUseError if a leaf in this library's form cannot be adapted."""
        own = {_own_path(path, None): path for path in self.leaves.faults}
        for path in paths:
            if path in own:
                raise KernelUseError(self._why_not(own[path]))

    @functools.cached_property
    def _shapes(self) -> Tree:
        return self._matrices(self.leaves.shapes)

    def _matrices(self, flat: Mapping[Path, Any]) -> Tree:
        """Returns leaves by the module's paths as parameters in this library's form."""
        found = {}
        for path, leaf in flat.items():
            site = self.leaves.sites.get(path)
            if site is not None:
                abstract = isinstance(leaf, jax.ShapeDtypeStruct)
                matrices = site.layout.matrices
                leaf = jax.eval_shape(matrices, leaf) if abstract else matrices(leaf)
            found[_own_path(path, site)] = leaf
        return unflatten(found)

    def _restore(self, params: Tree) -> dict[Path, Any]:
        """Returns parameters by the module's paths, with a `BoundKernel` at each adapted one.

        Raises:
          KernelUseError: A kernel is adapted that no layer of Flax multiplies by.
        """
        self.check_params(jax.tree.map(_base, params, is_leaf=_is_adapted))
        flat = flatten(params)
        found = {}
        for path in self.leaves.shapes:
            site = self.leaves.sites.get(path)
            leaf, name = flat[_own_path(path, site)], join_path(path[:-1])
            if site is None:
                if isinstance(leaf, AdaptedKernel):
                    raise KernelUseError(self._why_not(path))
                found[path] = leaf
            elif isinstance(leaf, AdaptedKernel):
                found[path] = BoundKernel.create(leaf, name, site.layout)
            else:
                found[path] = site.layout.restore(leaf)
        return found

    def _plain(self, params: Tree) -> dict[Path, Any]:
        """Returns parameters without adapters by the module's paths.

        Raises:
          ValueError: An adapter is bound.
        """
        for path, leaf in flatten(params).items():
            if isinstance(leaf, AdaptedKernel):
                raise ValueError(
                    f"{join_path(path[:-1])} has an adapter bound; merge it first, with spec.merge"
                )
        return self._restore(params)

    def _why_not(self, path: Path) -> str:
        why = self.leaves.faults.get(path, "no layer of Flax multiplies by it")
        return (
            f"{join_path(path[:-1])} cannot be adapted: {why}. Leave it out with exclude_modules,"
            " or train it in full with modules_to_save"
        )


def _own_path(path: Path, site: Site | None) -> Path:
    """Returns the path of a leaf in this library's form.

    Under the root key "layers" this library has stacked leaves with layer numbers. A module's own
    "layers" are joined with the next key, so that all names stay the same.
    """
    if site is not None:
        path = (*path[:-1], TABLE if site.layer.kernel == "embedding" else "kernel")
    if path[0] != STACKED:
        return path
    return (join_path(path[:2]), *path[2:]) if len(path) > 2 else ("", *path)


def _is_adapted(node: Any) -> bool:
    return isinstance(node, AdaptedKernel)


def _base(node: Any) -> Any:
    return _base(node.base) if isinstance(node, AdaptedKernel) else node


def describe_leaves(
    flat: Mapping[Path, Any], modules: Mapping[Path, Submodule], where: str
) -> Leaves:
    """Returns the leaves of a module, and which of them can be adapted.

    Args:
      flat: Leaves by the module's paths, arrays or shapes.
      modules: Submodules by path.
      where: Where the submodules were found, for messages.
    """
    shapes, sites, faults = {}, {}, {}
    for path, leaf in flat.items():
        shapes[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        submodule = modules.get(path[:-1])
        if submodule is None:
            faults[path] = f"it is not in {where}"
            continue
        layer, module = submodule.layer, submodule.module
        if layer is None or path[-1] != layer.kernel:
            name = type(module).__name__
            faults[path] = f"{name} uses its {path[-1]} in code of its own"
        elif fault := layer.fault(module):
            faults[path] = fault
        else:
            layout = layer.axes(module).layout(leaf.shape)
            if submodule.shape in (None, layout.shape):
                sites[path] = Site(layer=layer, layout=layout)
            else:
                faults[path] = _OTHER_AXIS
    return Leaves(shapes=shapes, sites=sites, faults=faults)
