"""Reads the `config.json` of GLM-4 and GLM-4.5."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given
from peft_jax.models.common_attributes import COMMON, SILU, read_sizes
from peft_jax.models.deepseek_family import PREDICTING, ROUTED, read_forms, read_routing
from peft_jax.models.family import Family
from peft_jax.models.glm import Glm
from peft_jax.models.layer_types import LayerType, shortest_cycle
from peft_jax.models.llama import LlamaConfig
from peft_jax.models.moe_families import BALANCING, by_expert
from peft_jax.models.naming import Naming
from peft_jax.models.rope_attributes import read_rotary
from peft_jax.models.shared_experts import SharedExpertsConfig, SharedExpertsLlama

_GLM4 = AttributeTable(
    family="glm4",
    unpacks=True,
    architectures=frozenset({"Glm4ForCausalLM", "Glm4Model"}),
    read=COMMON | {"attention_bias"},
    fixed=SILU,
)
_GLM4_MOE = AttributeTable(
    family="glm4_moe",
    unpacks=True,
    architectures=frozenset({"Glm4MoeForCausalLM", "Glm4MoeModel"}),
    read=COMMON | ROUTED | {"attention_bias", "use_qk_norm"},
    irrelevant=BALANCING | PREDICTING,
    fixed=SILU,
)
_ROTATED_PART = 0.5


def read_glm4(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of GLM-4."""
    _GLM4.check(hf_config)
    sizes = read_sizes(hf_config, head_dim=128, num_kv_heads=2, norm_epsilon=1.5625e-7)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"], default_part=_ROTATED_PART)
    bias = given(hf_config, "attention_bias", True)
    return LlamaConfig(layer_types=(LayerType(rotary=rotary),), qkv_bias=bias, **sizes)


def read_glm4_moe(hf_config: Mapping[str, Any]) -> SharedExpertsConfig:
    """Reads the configuration of GLM-4.5 and 4.6: the experts of DeepSeek-V3."""
    _GLM4_MOE.check(hf_config)
    sizes = read_sizes(hf_config, num_kv_heads=8, norm_epsilon=1e-5)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"], default_part=_ROTATED_PART)
    layers = [LayerType(form=form, rotary=rotary) for form in read_forms(hf_config, 1)]
    return SharedExpertsConfig(
        layer_types=shortest_cycle(layers),
        qkv_bias=given(hf_config, "attention_bias", False),
        qk_norm=given(hf_config, "use_qk_norm", False),
        **read_routing(hf_config, experts=128, groups=1, groups_per_token=1, scale=1.0),
        **sizes,
    )


GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    read_config=read_glm4,
    decoder=Glm,
    naming=Naming(prefix="model", blocks="layers"),
)
GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read_config=read_glm4_moe,
    decoder=SharedExpertsLlama,
    naming=Naming(
        prefix="model",
        blocks="layers",
        stored=by_expert("mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
    ),
    # Layers after the last one predict several tokens at once.
    unused=(r"model\.layers\.{layers}\..*",),
)
