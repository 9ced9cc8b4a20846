"""Defines the interface of methods that train virtual tokens in place of kernels.

A virtual token is a trainable position before the tokens of every sequence. `AdapterSpec` binds
`VirtualTokens` at the root of a model's parameters, from where a causal language model takes it.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.adapters.gradient_products import kernel_shape
from peft_jax.adapters.method import TrainingMethod
from peft_jax.core import (
    EMBEDDING,
    KERNEL,
    VIRTUAL,
    Path,
    Tree,
    VirtualTokens,
    flatten,
    is_stacked,
)
from peft_jax.core.validation import check_positive_int

_FUSED = {"c_attn": "c_proj", "query_key_value": "dense", "qkv_proj": "o_proj"}
"""Names of fused maps to queries, keys and values, and of the output maps beside them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Sizes of a decoder that virtual tokens depend on.

    Attributes:
      embedding: Path of the embedding.
      embed: Number of features of an embedding.
      layers: Number of layers.
      kv_width: Number of features of a token's keys in a layer.
    """

    embedding: Path
    embed: int
    layers: int
    kv_width: int

    @classmethod
    def of(cls, params: Tree) -> "Dimensions":
        """Reads the sizes from a decoder's parameters, arrays or shapes.

        Raises:
          ValueError: The parameters are not those of a decoder.
        """
        flat = flatten(params)
        tables = [path for path in flat if path[-1] == EMBEDDING]
        if len(tables) != 1 or not (width := _kv_width(flat)):
            raise ValueError(
                "virtual tokens need a decoder with one embedding and maps to keys, but these"
                f" parameters have {len(tables)} embeddings and the modules"
                f" {', '.join(sorted({'.'.join(path[:-1]) for path in flat}))}"
            )
        shapes = {path: kernel_shape(leaf) for path, leaf in flat.items() if path[-1] == KERNEL}
        return cls(
            embedding=tables[0],
            embed=flat[tables[0]].shape[-1],
            layers=next(shape[0] for path, shape in shapes.items() if is_stacked(path)),
            kv_width=width,
        )


def _kv_width(flat: Mapping[Path, Any]) -> int:
    """Returns the number of features of a token's keys; 0 if there is no map to them."""
    for path, leaf in flat.items():
        if path[-2:] == ("k_proj", KERNEL):
            return kernel_shape(leaf)[-1]
        output = (*path[:-2], _FUSED.get(path[-2], "") if len(path) > 1 else "", KERNEL)
        if path[-1] == KERNEL and output in flat:
            return (kernel_shape(leaf)[-1] - kernel_shape(flat[output])[-2]) // 2
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualMethod(TrainingMethod, abc.ABC):
    """Base class of methods that train virtual tokens.

    They change no kernel, so that nothing is merged. The loss counts no virtual token.

    Attributes:
      num_virtual_tokens: Number n of virtual tokens.
    """

    merges: ClassVar[bool] = False

    num_virtual_tokens: int = 20

    def __post_init__(self) -> None:
        check_positive_int("num_virtual_tokens", self.num_virtual_tokens)

    def reads(self, params: Tree) -> tuple[Path, ...]:
        """Returns the paths of the leaves whose values `init` reads."""
        del params
        return ()

    @abc.abstractmethod
    def init(self, key: jax.Array, params: Tree) -> dict[str, Array]:
        """Returns the initial trainable arrays, float32.

        Args:
          key: Random key.
          params: The model's parameters. Leaves other than those of `reads` may be shapes.

        Raises:
          ValueError: The parameters are not those of a decoder.
        """

    @abc.abstractmethod
    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Returns the logical axes of the arrays of `init`."""

    @abc.abstractmethod
    def virtual_tokens(self, arrays: Mapping[str, Array]) -> VirtualTokens:
        """Returns the virtual tokens, given the trainable arrays."""


def virtual_arrays(state_tree: Mapping[str, Any]) -> dict[Path, Any]:
    """Returns the arrays of virtual tokens in a tree of `AdapterState`, by path."""
    return {path: leaf for path, leaf in flatten(state_tree).items() if path[0] == VIRTUAL}


def torch_uniform(inputs: int) -> Any:
    """Returns a function that draws as torch's linear layers with a number of inputs do."""
    bound = 1.0 / math.sqrt(inputs)
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
