"""Builds a causal language model from a `config.json`."""

import json
from collections.abc import Mapping
from typing import Any

from peft_jax.core import did_you_mean
from peft_jax.models.bloom_family import BLOOM
from peft_jax.models.causal_lm import CausalLM
from peft_jax.models.classifier import is_encoder
from peft_jax.models.cohere2_family import COHERE2
from peft_jax.models.deepseek_family import DEEPSEEK_V3
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.family import Family
from peft_jax.models.gemma4_family import GEMMA4, GEMMA4_TEXT
from peft_jax.models.gemma_families import GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES
from peft_jax.models.glm_families import GLM4, GLM4_MOE
from peft_jax.models.gpt2_family import GPT2_FAMILY
from peft_jax.models.gpt_neox_family import GPT_NEOX
from peft_jax.models.gpt_oss_family import GPT_OSS
from peft_jax.models.llama4_family import LLAMA4, LLAMA4_TEXT
from peft_jax.models.llama_families import (
    GRANITE,
    LLAMA,
    MINISTRAL,
    MISTRAL,
    MISTRAL3,
    QWEN2,
    QWEN3,
    SMOLLM3,
)
from peft_jax.models.moe_families import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from peft_jax.models.olmo_families import OLMO2, OLMO3
from peft_jax.models.phi3_family import PHI3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(BLOOM, COHERE2, DEEPSEEK_V3, GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES, GEMMA4),
        *(GEMMA4_TEXT, GLM4, GLM4_MOE),
        *(GPT2_FAMILY, GPT_NEOX, GPT_OSS, GRANITE, LLAMA, LLAMA4, LLAMA4_TEXT, MINISTRAL, MISTRAL),
        *(MISTRAL3, MIXTRAL, OLMO2, OLMO3, PHI3, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, SMOLLM3),
    )
}
"""Families by the `model_type` of their `config.json`."""


def build_model(
    hf_config: Mapping[str, Any], execution: ExecutionSettings | None = None
) -> CausalLM:
    """Builds the model that a Hugging Face `config.json` describes.

    Args:
      hf_config: The parsed `config.json`, as transformers 4 or 5 writes it.
      execution: Execution settings; None for the defaults.

    Raises:
      ValueError: The family or an attribute is unknown; the message names it.

    Example:
      >>> model = build_model({
      ...     "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2,
      ...     "num_attention_heads": 2, "intermediate_size": 16})
      >>> model.abstract_params()["layers"]["mlp"]["up_proj"]["kernel"].shape
      (2, 8, 16)
    """
    model_type = hf_config.get("model_type")
    if is_encoder(hf_config):
        raise ValueError(
            f"config.json sets model_type = {model_type!r}, an encoder, which generates no text;"
            " build it with build_classifier (load_classifier), or fine-tune it with a recipe that"
            " has labels"
        )
    if model_type not in FAMILIES:
        code = ""
        if hf_config.get("auto_map"):
            code = " (its auto_map names code of its own, which is never downloaded or run)"
        raise ValueError(
            f"config.json sets model_type = {model_type!r}, which is not implemented{code}"
            f"{did_you_mean(str(model_type), FAMILIES)}"
        )
    family = FAMILIES[model_type]
    return CausalLM(
        family=family,
        config=family.read_config(hf_config),
        execution=execution or ExecutionSettings(),
        hf_json=json.dumps(dict(hf_config)),
    )
