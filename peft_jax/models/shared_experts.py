"""Decoders of the Llama family with experts beside one that all tokens share: GLM-4.5.

Experts are chosen by `grouped_routing`. The first layers have an MLP in place of experts.

Source: Zeng et al., 2025 (arXiv 2508.06471).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from peft_jax.core.validation import check_positive_int
from peft_jax.models.decoder import Hidden
from peft_jax.models.decoder_parts import GatedMLP
from peft_jax.models.experts import SparseMLP
from peft_jax.models.grouped_routing import CorrectedRouter, GroupedRouting
from peft_jax.models.llama import Llama, LlamaBlock
from peft_jax.models.moe_llama import DENSE, EXPERTS, MoELlamaConfig, gated_silu


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig(MoELlamaConfig):
    """Architecture of a model with shared experts.

    Attributes:
      shared_experts: Number of experts that all tokens share, which are computed as one.
    """

    routing: GroupedRouting
    shared_experts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("n_shared_experts", self.shared_experts)


class SharedSparseMLP(SparseMLP):
    """A router and its experts, and experts that all tokens share."""

    def __init__(self, config: Any):
        features = config.expert_size or config.intermediate_size
        super().__init__(
            config, config.routing, features=features, gate=gated_silu, router=CorrectedRouter
        )
        self.shared_experts = GatedMLP(config, features=features * config.shared_experts)

    def __call__(self, x: Hidden) -> Hidden:
        """Returns the weighted sum of each token's experts and the shared ones, [B, T, D]."""
        return super().__call__(x) + self.shared_experts(x)


class SharedSparseBlock(LlamaBlock):
    """A block of the Llama family with shared experts."""

    @staticmethod
    def make_mlp(config: Any) -> nnx.Module:
        """Returns the router and the experts."""
        return SharedSparseMLP(config)


class SharedExpertsLlama(Llama):
    """The decoder of GLM-4.5."""

    config: SharedExpertsConfig
    forms: ClassVar[Mapping[str, type[Any]]] = {DENSE: LlamaBlock, EXPERTS: SharedSparseBlock}
