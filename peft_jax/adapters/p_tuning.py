"""Implements P-tuning: prompt tuning whose embeddings a small network computes while training."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax.adapters.peft_form import PeftForm
from peft_jax.adapters.prompt_tuning import PTuningForm
from peft_jax.adapters.virtual_form import TENSOR, VirtualForm
from peft_jax.adapters.virtual_method import Dimensions, VirtualMethod, torch_uniform
from peft_jax.core import Tree, VirtualTokens, linear
from peft_jax.core.validation import check_count

LAYERS = ("first", "second", "third")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(VirtualMethod):
    """P-tuning: the embeddings of n virtual tokens are W₃ σ(W₂ σ(W₁ e + b₁) + b₂) + b₃.

    σ is max(0, x). The network reparametrizes prompt tuning: only its result is used afterwards.
    Trainable arrays: `embedding` [n, embed], initially standard normal, and of each layer a matrix
    [inputs, outputs] (`first`, `second`, `third`) and a bias (`first_bias`, …), initially as
    torch's linear layers.

    Attributes:
      num_virtual_tokens: Number n of virtual tokens.
      hidden_size: Number of hidden features of the network; 0 for that of an embedding.

    Source: Liu et al., 2021, arXiv 2103.10385, with Hugging Face PEFT's default network, and not
    the paper's recurrent one.
    """

    name: ClassVar[str] = "p_tuning"
    learning_rate: ClassVar[float] = 1e-3
    no_decay: ClassVar[tuple[str, ...]] = ("embedding",)

    hidden_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("hidden_size", self.hidden_size)

    def init(self, key: jax.Array, params: Tree) -> dict[str, Array]:
        """Returns random embeddings and a random network."""
        embed = Dimensions.of(params).embed
        hidden = self.hidden_size or embed
        first, *keys = jax.random.split(key, 7)
        shape = (self.num_virtual_tokens, embed)
        arrays = {"embedding": jax.random.normal(first, shape, jnp.float32)}
        sizes = (embed, hidden, hidden, embed)
        for index, name in enumerate(LAYERS):
            inputs, outputs = sizes[index : index + 2]
            draw = torch_uniform(inputs)
            arrays[name] = draw(keys[2 * index], (inputs, outputs))
            arrays[f"{name}_bias"] = draw(keys[2 * index + 1], (outputs,))
        return arrays

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Returns axes that are not sharded: all devices compute the embeddings."""
        arrays = {"embedding": 2} | dict.fromkeys(LAYERS, 2)
        arrays |= {f"{name}_bias": 1 for name in LAYERS}
        return {name: (None,) * count for name, count in arrays.items()}

    def virtual_tokens(self, arrays: Mapping[str, Array]) -> VirtualTokens:
        """Returns the embeddings that the network computes."""
        hidden = arrays["embedding"]
        for name in LAYERS:
            hidden = linear(hidden, arrays[name]) + arrays[f"{name}_bias"]
            hidden = hidden if name == LAYERS[-1] else jax.nn.relu(hidden)
        return VirtualTokens(embeddings=hidden)

    def peft_form(self) -> PeftForm | None:
        """Returns PEFT's form; none for a subclass, which may compute something else."""
        return WrittenPTuningForm(self) if type(self) is PTuning else None


@dataclasses.dataclass(frozen=True)
class WrittenPTuningForm(PTuningForm):
    """Stores the embeddings that the network has computed, without the network.

    Attributes:
      method: A `PTuning`.
    """

    method: Any
    exact = False

    def settings(self) -> dict[str, Any]:
        """Returns the settings of the network, which PEFT does not build for a trained adapter."""
        return {
            **VirtualForm.settings(self),
            "encoder_hidden_size": self.method.hidden_size or None,
            "encoder_reparameterization_type": "MLP",
        }

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Computes the embeddings."""
        found = self.method.virtual_tokens({k: jnp.asarray(v) for k, v in arrays.items()})
        return {TENSOR: np.asarray(found.embeddings)}
