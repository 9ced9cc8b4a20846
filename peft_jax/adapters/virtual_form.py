"""Converts virtual tokens to Hugging Face PEFT's tensors, and back."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes
from peft_jax.adapters.virtual_method import Dimensions, VirtualMethod

TENSOR = "prompt_embeddings"
"""Name of the only tensor of a file."""


@dataclasses.dataclass(frozen=True)
class VirtualForm(PeftForm):
    """PEFT's form of virtual tokens, which belong to no module."""

    method: Any
    names: ClassVar[tuple[str, ...]] = (TENSOR,)
    saves_modules: ClassVar[bool] = False
    understood: ClassVar[PeftSettings] = PeftSettings(
        read={"num_virtual_tokens": int},
        # They follow from the base model, and the tensor's shape is checked.
        irrelevant=frozenset({"num_attention_heads", "num_layers", "token_dim"}),
        fixed={"num_transformer_submodules": (None, 1)},
        compared=("num_virtual_tokens",),
    )

    @classmethod
    def read_virtual(cls, config: Mapping[str, Any], count: int) -> VirtualMethod:
        """Returns the method with `count` virtual tokens and the configuration's settings."""
        raise NotImplementedError(f"{cls.__name__} is written only")

    def settings(self) -> dict[str, Any]:
        """Returns the number of virtual tokens."""
        return {
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.method.num_virtual_tokens,
        }

    @abc.abstractmethod
    def restore_virtual(self, tensor: np.ndarray, sizes: Dimensions) -> dict[str, np.ndarray]:
        """Converts the tensor to the trainable arrays; inverse of `export` if it is exact."""

    @abc.abstractmethod
    def virtual_shape(self, sizes: Dimensions) -> tuple[int, int]:
        """Returns the shape of the tensor, [n, features]."""

    @abc.abstractmethod
    def token_dim(self, sizes: Dimensions) -> int:
        """Returns the setting `token_dim`."""

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns no shapes: kernels have no tensors."""
        del d_in, d_out
        return {}
