"""Interface of a model family: configuration, module and checkpoint names."""

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
    """Architecture of a model: the fields every family's (frozen, hashable) configuration has."""

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding."""

    @property
    def hidden_size(self) -> int:
        """Number of features of the residual stream."""

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""

    @property
    def num_heads(self) -> int:
        """Number of query heads."""

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads; divides `num_heads`."""

    @property
    def head_dim(self) -> int:
        """Number of features per head."""

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
        """Returns the hidden states after the final norm, and the updated cache if one is given."""

    def head_kernel(self) -> Kernel:
        """Returns the head, [embed, vocab]; if tied, the transposed embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Describes one family of models.

    Attributes:
      model_type: `model_type` in `config.json`.
      architecture: Class name in transformers.
      read_config: Builds the family's configuration; raises ValueError for unknown attributes.
      decoder: Module class.
      naming: Names of tensors and modules in Hugging Face checkpoints.
      unused: Regular expressions of tensors that checkpoints may hold but the model ignores, such
        as pretraining heads; "{layers}" stands for the number of layers.
      old_names: (old suffix, new suffix) of tensors that old checkpoints name differently.
      old_prefixes: (old prefix, new prefix) of such tensors.
      text_part: Attribute of `config.json` that describes the language model; empty if all of the
        file does.
      text_defaults: Attributes that this part may omit, with their values.
      alone: Family of the language model alone, as which models are saved; None for this one.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    decoder: Callable[..., Any]
    naming: Naming
    unused: tuple[str, ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()
    old_prefixes: tuple[tuple[str, str], ...] = ()
    text_part: str = ""
    text_defaults: tuple[tuple[str, Any], ...] = ()
    alone: "Family | None" = None
