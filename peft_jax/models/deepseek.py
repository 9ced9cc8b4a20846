"""Decoder of DeepSeek-V3 and R1: latent attention, and experts beside one that all tokens share.

Source: DeepSeek-AI, 2024 (arXiv 2412.19437).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from peft_jax.models.latent_attention import LatentAttention, LatentConfig
from peft_jax.models.llama import Llama, LlamaBlock
from peft_jax.models.moe_llama import DENSE, EXPERTS
from peft_jax.models.shared_experts import SharedExpertsConfig, SharedSparseBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekConfig(SharedExpertsConfig, LatentConfig):
    """Architecture of a DeepSeek model; see both bases for the attributes."""


class DeepseekBlock(LlamaBlock):
    """A block of DeepSeek with an MLP."""

    attention = LatentAttention


class DeepseekSparseBlock(SharedSparseBlock):
    """A block of DeepSeek with experts."""

    attention = LatentAttention


class Deepseek(Llama):
    """The decoder of DeepSeek-V3 and R1."""

    config: DeepseekConfig
    forms: ClassVar[Mapping[str, type[Any]]] = {DENSE: DeepseekBlock, EXPERTS: DeepseekSparseBlock}
