"""Decoders of the Llama family whose MLPs are mixtures of experts: Mixtral, Qwen2 and Qwen3 MoE.

Sources: Jiang et al., 2024 (arXiv 2401.04088); Yang et al., 2024 and 2025 (arXiv 2407.10671,
2505.09388).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from peft_jax.core.validation import check_positive_int
from peft_jax.models.decoder import Hidden
from peft_jax.models.decoder_parts import GatedMLP, linear_map
from peft_jax.models.experts import Routing, SparseMLP
from peft_jax.models.llama import Llama, LlamaBlock, LlamaConfig

DENSE, EXPERTS = "dense", "experts"
"""Forms of blocks: with an MLP, and with experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoELlamaConfig(LlamaConfig):
    """Architecture of a model with experts.

    Attributes:
      routing: How tokens choose experts.
      expert_size: Number of features of one expert; None for `intermediate_size`, which is that of
        layers without experts otherwise.
    """

    routing: Routing
    expert_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_size is not None:
            check_positive_int("moe_intermediate_size", self.expert_size)


def gated_silu(both: Float[Array, "rows both"]) -> Float[Array, "rows features"]:
    """Returns silu(gate) * up of the two halves."""
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gate) * up


class MoELlamaBlock(LlamaBlock):
    """A block of the Llama family with experts."""

    @staticmethod
    def make_mlp(config: Any) -> nnx.Module:
        """Returns the router and the experts."""
        return SparseMLP(config, config.routing, features=config.expert_size, gate=gated_silu)


class MoELlama(Llama):
    """The decoder of Mixtral and Qwen3 MoE."""

    config: MoELlamaConfig
    block: type[Any] = MoELlamaBlock
    forms: ClassVar[Mapping[str, type[Any]]] = {DENSE: LlamaBlock, EXPERTS: MoELlamaBlock}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedExpertConfig(MoELlamaConfig):
    """Architecture of a model with an expert that all tokens share.

    Attributes:
      shared_expert_size: Number of features of the shared expert.
    """

    shared_expert_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("shared_expert_intermediate_size", self.shared_expert_size)


class GatedExpertMLP(SparseMLP):
    """A router and its experts, and a shared expert with a gate for each token."""

    def __init__(self, config: GatedExpertConfig):
        super().__init__(config, config.routing, features=config.expert_size, gate=gated_silu)
        self.shared_expert = GatedMLP(config, features=config.shared_expert_size)
        self.shared_expert_gate = linear_map(config, config.hidden_size, 1, ("embed", None))

    def __call__(self, x: Hidden) -> Hidden:
        """Returns the weighted sum of each token's experts and the shared one, [B, T, D]."""
        share = jax.nn.sigmoid(self.shared_expert_gate(x))
        return super().__call__(x) + share * self.shared_expert(x)


class GatedExpertBlock(LlamaBlock):
    """A block of the Llama family with experts, one of them shared."""

    @staticmethod
    def make_mlp(config: Any) -> nnx.Module:
        """Returns the router and the experts."""
        return GatedExpertMLP(config)


class GatedExpertLlama(MoELlama):
    """The decoder of Qwen2 MoE."""

    config: GatedExpertConfig
    block = GatedExpertBlock
    forms: ClassVar[Mapping[str, type[Any]]] = {DENSE: LlamaBlock, EXPERTS: GatedExpertBlock}
