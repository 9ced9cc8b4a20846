"""Reads the `config.json` of DeepSeek-V3 and R1."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.common_attributes import COMMON, SILU, read_sizes
from peft_jax.models.deepseek import Deepseek, DeepseekConfig
from peft_jax.models.family import Family
from peft_jax.models.grouped_routing import GroupedRouting
from peft_jax.models.layer_types import LayerType, shortest_cycle
from peft_jax.models.moe_families import BALANCING, by_expert
from peft_jax.models.moe_llama import DENSE, EXPERTS
from peft_jax.models.naming import Naming
from peft_jax.models.rope_attributes import read_rotary
from peft_jax.models.rope_scaling import YarnScaling

ROUTED = frozenset(
    {
        "first_k_dense_replace",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_experts_per_tok",
        "num_local_experts",
        "routed_scaling_factor",
        "topk_group",
    }
)
"""Attributes that `read_routing` and `read_forms` read."""

PREDICTING = frozenset({"num_mtp_layers", "num_nextn_predict_layers"})
"""Attributes of layers that predict several tokens at once, which are not read."""

_DEEPSEEK_V3 = AttributeTable(
    family="deepseek_v3",
    unpacks=True,
    architectures=frozenset({"DeepseekV3ForCausalLM", "DeepseekV3Model"}),
    read=COMMON
    | ROUTED
    | {"attention_bias", "kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_nope_head_dim"}
    | {"qk_rope_head_dim", "rope_interleave", "v_head_dim"},
    irrelevant=BALANCING | PREDICTING | {"aux_loss_alpha", "ep_size", "seq_aux"},
    fixed=SILU
    | {"moe_layer_freq": (1,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
)


def read_deepseek_v3(hf_config: Mapping[str, Any]) -> DeepseekConfig:
    """Reads the configuration of DeepSeek-V3 or R1."""
    _DEEPSEEK_V3.check(hf_config)
    plain, rotated = (
        given(hf_config, "qk_nope_head_dim", 128),
        given(hf_config, "qk_rope_head_dim", 64),
    )
    _check_equal(hf_config, "head_dim", rotated, "qk_rope_head_dim")
    _check_equal(hf_config, "qk_head_dim", plain + rotated, "qk_nope_head_dim + qk_rope_head_dim")
    sizes = read_sizes({**hf_config, "head_dim": plain + rotated})
    rotary = read_rotary(hf_config, head_dim=rotated)
    scale = (plain + rotated) ** -0.5
    if isinstance(rotary.scaling, YarnScaling):
        scale *= rotary.scaling.score_factor
    bias = given(hf_config, "attention_bias", False)
    layers = [LayerType(form=form, rotary=rotary) for form in read_forms(hf_config, 3)]
    return DeepseekConfig(
        layer_types=shortest_cycle(layers),
        query_rank=hf_config.get("q_lora_rank", 1536),
        latent_rank=given(hf_config, "kv_lora_rank", 512),
        rotated_dim=rotated,
        value_head_dim=given(hf_config, "v_head_dim", 128),
        neighbors_paired=given(hf_config, "rope_interleave", True),
        score_scale=scale,
        qkv_bias=bias,
        output_bias=bias,
        **read_routing(hf_config, experts=256, groups=8, groups_per_token=4, scale=2.5),
        **sizes,
    )


def read_forms(hf_config: Mapping[str, Any], dense: int) -> list[str]:
    """Returns the form of every layer: the first ones have no experts.

    Args:
      hf_config: The parsed `config.json`.
      dense: Number of layers without experts where none is given.
    """
    count = require(hf_config, "num_hidden_layers")
    first = given(hf_config, "first_k_dense_replace", dense)
    return [DENSE if layer < first else EXPERTS for layer in range(count)]


def read_routing(
    hf_config: Mapping[str, Any],
    *,
    experts: int,
    groups: int,
    groups_per_token: int,
    scale: float,
) -> dict[str, Any]:
    """Reads the fields of `DeepseekConfig` that describe experts; the arguments are defaults."""
    count = given(hf_config, "n_routed_experts", given(hf_config, "num_local_experts", experts))
    return {
        "routing": GroupedRouting(
            num_experts=count,
            experts_per_token=given(hf_config, "num_experts_per_tok", 8),
            normalized=given(hf_config, "norm_topk_prob", True),
            groups=given(hf_config, "n_group", groups),
            groups_per_token=given(hf_config, "topk_group", groups_per_token),
            scale=given(hf_config, "routed_scaling_factor", scale),
        ),
        "expert_size": require(hf_config, "moe_intermediate_size"),
        "shared_experts": given(hf_config, "n_shared_experts", 1),
    }


def _check_equal(hf_config: Mapping[str, Any], name: str, value: int, what: str) -> None:
    """Raises ValueError if a derived attribute contradicts the attributes it derives from."""
    if given(hf_config, name, value) != value:
        raise ValueError(
            f"config.json sets {name} = {hf_config[name]!r}, but {what} gives {value}; remove"
            f" {name}, or correct them"
        )


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read_config=read_deepseek_v3,
    decoder=Deepseek,
    naming=Naming(
        prefix="model",
        blocks="layers",
        stored=by_expert("mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
    ),
    # Layers after the last one predict several tokens at once.
    unused=(r"model\.layers\.{layers}\..*",),
)
