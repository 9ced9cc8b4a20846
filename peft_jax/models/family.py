"""What a family of models has to offer."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from peft_jax.core import Kernel
from peft_jax.models.cache import KVCache
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.naming import Naming


@runtime_checkable
class ModelConfig(Hashable, Protocol):
    """The architecture of a model: what every family's (frozen, hashable) configuration has."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def hidden_size(self) -> int:
        """Features of the residual stream."""

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""

    @property
    def num_heads(self) -> int:
        """Query heads."""

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads; divides `num_heads`."""

    @property
    def head_dim(self) -> int:
        """Features of a head."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the transposed embedding."""


@runtime_checkable
class Decoder(Protocol):
    """A decoder-only language model as a Flax NNX module, blocks stacked under `layers`."""

    def __init__(self, config: Any, execution: ExecutionSettings): ...

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Array, "batch tokens embed"], KVCache | None]:
        """The hidden states after the final norm, and the cache where one was given."""

    def head_kernel(self) -> Kernel:
        """The head, [embed, vocab]; with tied embeddings, the transposed embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family: how its `config.json` is read, its module, and the names of its tensors.

    Attributes:
      model_type: what `config.json` calls it.
      architecture: the name of its class in transformers.
      read_config: builds the family's configuration, refusing what is not understood.
      decoder: the module.
      naming: of tensors and modules in Hugging Face checkpoints.
      unused: regular expressions for tensors that its checkpoints may hold and the model leaves:
        heads it was pretrained with, tensors that repeat what `config.json` says.
      old_names: (ending, ending now) of tensors that old checkpoints call otherwise.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    decoder: Callable[..., Any]
    naming: Naming
    unused: tuple[str, ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()
