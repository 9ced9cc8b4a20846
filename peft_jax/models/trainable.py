"""Interface of models that can be trained: those of this library, and Flax modules of one's own."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import jax.numpy as jnp

from peft_jax.core import VIRTUAL, Path, Tree, did_you_mean, flatten
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.naming import HFTensor


class TrainableModel(abc.ABC):
    """What training and adapter files need of a model: the names and shapes of its parameters.

    Attributes:
      execution: Execution settings.
      origin: Folder that the parameters were read from; empty if unknown.
    """

    execution: ExecutionSettings
    origin: str
    takes_virtual_tokens: ClassVar[bool] = False
    """Whether virtual tokens can come before the tokens: in causal language models."""

    def check_virtual(self, params: Mapping[str, Any]) -> None:
        """Raises ValueError if virtual tokens are bound to a model that takes none.

        Args:
          params: Parameters, or an adapter's trainable arrays.
        """
        if VIRTUAL in params and not self.takes_virtual_tokens:
            raise ValueError(
                f"virtual tokens are for causal language models of this library, and"
                f" {self.model_type} is none; choose a method that adapts kernels, such as lora"
            )

    @property
    @abc.abstractmethod
    def model_type(self) -> str:
        """Name of the architecture in files of adapters."""

    @property
    @abc.abstractmethod
    def num_layers(self) -> int:
        """Number of layers that are stacked under "layers"."""

    @abc.abstractmethod
    def abstract_params(
        self, dtype: Any = jnp.float32, quantization: str = "none", platform: str = ""
    ) -> Tree:
        """Returns the shapes of all parameters."""

    @abc.abstractmethod
    def logical_axes(self, quantization: str = "none") -> Tree:
        """Returns the logical name of every axis of every parameter."""

    @abc.abstractmethod
    def shardable_sizes(self) -> dict[str, int]:
        """Returns the size of each logical axis that a mesh must divide to shard it."""

    @abc.abstractmethod
    def hf_names(self) -> dict[Path, HFTensor]:
        """Returns the tensor of every leaf in a checkpoint."""

    @abc.abstractmethod
    def module_name(self, path: Path, layer: int | None = None) -> str:
        """Returns the name of the module that holds the leaf at `path`."""

    def layers_of(self, path: Path) -> Sequence[int]:
        """Returns the layer of each row of the stacked leaf at `path`."""
        del path
        return range(self.num_layers)

    def check_params(self, params: Tree, quantization: str = "none") -> None:
        """Raises ValueError unless the leaves have this model's names and shapes.

        Args:
          params: Parameters, as arrays or shapes.
          quantization: See `abstract_params`.

        Raises:
          ValueError: A leaf is missing, unknown or of another shape.
        """
        expected, found = flatten(self.abstract_params(quantization=quantization)), flatten(params)
        if found.keys() != expected.keys():
            raise_leaf_mismatch(set(found), set(expected))
        for path, leaf in found.items():
            if tuple(leaf.shape) != tuple(expected[path].shape):
                raise ValueError(
                    f"the parameters do not fit the model: {'.'.join(path)} has shape"
                    f" {list(leaf.shape)}, but must have shape {list(expected[path].shape)}"
                )


def raise_leaf_mismatch(found: set[Path], expected: set[Path]) -> NoReturn:
    """Raises ValueError that names the leaves that are missing or unknown."""
    missing = sorted(".".join(path) for path in expected - found)
    unknown = sorted(".".join(path) for path in found - expected)
    parts = []
    if missing:
        parts.append(f"missing: {', '.join(missing)}")
    if unknown:
        parts.append(
            f"unknown: {', '.join(unknown)}{did_you_mean(unknown[0], missing) if missing else ''}"
        )
    raise ValueError(f"the parameters do not fit the model; {'; '.join(parts)}")
