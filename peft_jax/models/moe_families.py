"""Reads the `config.json` of Mixtral, Qwen2 MoE and Qwen3 MoE."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.common_attributes import COMMON, SILU, read_layer_types, read_sizes
from peft_jax.models.experts import Routing
from peft_jax.models.family import Family
from peft_jax.models.layer_types import LayerType, shortest_cycle
from peft_jax.models.moe_llama import (
    DENSE,
    EXPERTS,
    GatedExpertConfig,
    GatedExpertLlama,
    MoELlama,
    MoELlamaConfig,
)
from peft_jax.models.naming import Naming
from peft_jax.models.rope_attributes import read_rotary

BALANCING = frozenset({"output_router_logits", "router_aux_loss_coef"})
"""Attributes of the load-balancing loss, which is not part of the loss here."""

_QWEN = frozenset(
    {
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "sliding_window",
        "use_sliding_window",
    }
)
_MIXTRAL = AttributeTable(
    family="mixtral",
    unpacks=True,
    architectures=frozenset({"MixtralForCausalLM", "MixtralModel"}),
    read=COMMON | {"num_experts_per_tok", "num_local_experts", "sliding_window"},
    irrelevant=BALANCING,
    fixed=SILU | {"router_jitter_noise": (0.0,)},
)
_QWEN2_MOE = AttributeTable(
    family="qwen2_moe",
    unpacks=True,
    architectures=frozenset({"Qwen2MoeForCausalLM", "Qwen2MoeModel"}),
    read=COMMON
    | _QWEN
    | {"layer_types", "max_window_layers", "qkv_bias", "shared_expert_intermediate_size"},
    irrelevant=BALANCING,
    fixed=SILU,
)
_QWEN3_MOE = AttributeTable(
    family="qwen3_moe",
    unpacks=True,
    architectures=frozenset({"Qwen3MoeForCausalLM", "Qwen3MoeModel"}),
    read=COMMON | _QWEN | {"attention_bias"},
    irrelevant=BALANCING | {"max_window_layers"},
    fixed=SILU,
)


def read_mixtral(hf_config: Mapping[str, Any]) -> MoELlamaConfig:
    """Reads the configuration of Mixtral: a token's weights are normalized over its experts."""
    _MIXTRAL.check(hf_config)
    sizes = read_sizes(hf_config, num_kv_heads=8, norm_epsilon=1e-5)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"], default_theta=1000000.0)
    routing = Routing(
        num_experts=given(hf_config, "num_local_experts", 8),
        experts_per_token=given(hf_config, "num_experts_per_tok", 2),
        normalized=True,
    )
    layer = LayerType(window=hf_config.get("sliding_window"), rotary=rotary)
    return MoELlamaConfig(layer_types=(layer,), routing=routing, **sizes)


def read_qwen2_moe(hf_config: Mapping[str, Any]) -> GatedExpertConfig:
    """Reads the configuration of Qwen2 MoE: all tokens share one expert, which has a gate."""
    _QWEN2_MOE.check(hf_config)
    sizes = _read_qwen_sizes(hf_config, num_kv_heads=16)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"])
    window, slides = _read_window(hf_config), given(hf_config, "max_window_layers", 28)
    default = [
        "sliding_attention" if window and layer % 2 == 0 and layer < slides else "full_attention"
        for layer in range(sizes["num_layers"])
    ]
    both = {"sliding_attention": rotary, "full_attention": rotary}
    types = read_layer_types(hf_config, default, window=window, rotary=both)
    return GatedExpertConfig(
        layer_types=_with_forms(types, hf_config),
        routing=_read_qwen_routing(hf_config, experts=60, experts_per_token=4),
        shared_expert_size=given(hf_config, "shared_expert_intermediate_size", 5632),
        qkv_bias=given(hf_config, "qkv_bias", True),
        **sizes,
    )


def read_qwen3_moe(hf_config: Mapping[str, Any]) -> MoELlamaConfig:
    """Reads the configuration of Qwen3 MoE: the attention of Qwen3, and experts."""
    _QWEN3_MOE.check(hf_config)
    sizes = _read_qwen_sizes(hf_config, num_kv_heads=4)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"])
    bias = given(hf_config, "attention_bias", False)
    layer = LayerType(window=_read_window(hf_config), rotary=rotary)
    return MoELlamaConfig(
        layer_types=_with_forms((layer,), hf_config),
        routing=_read_qwen_routing(hf_config, experts=128, experts_per_token=8),
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        **sizes,
    )


def _read_qwen_sizes(hf_config: Mapping[str, Any], *, num_kv_heads: int) -> dict[str, Any]:
    """Reads the sizes of a model, and of one expert."""
    features = require(hf_config, "moe_intermediate_size")
    inner = given(hf_config, "intermediate_size", features)
    sizes = read_sizes({**hf_config, "intermediate_size": inner}, num_kv_heads=num_kv_heads)
    return {**sizes, "expert_size": features}


def _read_qwen_routing(
    hf_config: Mapping[str, Any], *, experts: int, experts_per_token: int
) -> Routing:
    """Reads how tokens choose experts; the arguments are defaults."""
    # transformers 5 renames num_experts.
    count = given(hf_config, "num_local_experts", given(hf_config, "num_experts", experts))
    return Routing(
        num_experts=count,
        experts_per_token=given(hf_config, "num_experts_per_tok", experts_per_token),
        normalized=given(hf_config, "norm_topk_prob", False),
    )


def _read_window(hf_config: Mapping[str, Any]) -> int | None:
    """Returns the sliding window; None unless it is in use."""
    uses = given(hf_config, "use_sliding_window", False)
    return hf_config.get("sliding_window", 4096) if uses else None


def _with_forms(
    types: tuple[LayerType, ...], hf_config: Mapping[str, Any]
) -> tuple[LayerType, ...]:
    """Returns the layers' types with the forms of their blocks, if some have no experts."""
    count = require(hf_config, "num_hidden_layers")
    dense, every = (
        given(hf_config, "mlp_only_layers", []),
        given(hf_config, "decoder_sparse_step", 1),
    )
    sparse = [layer not in dense and (layer + 1) % every == 0 for layer in range(count)]
    if all(sparse):
        return types
    return shortest_cycle(
        [
            dataclasses.replace(types[layer % len(types)], form=EXPERTS if has_experts else DENSE)
            for layer, has_experts in enumerate(sparse)
        ]
    )


def by_expert(
    module: str, gate: str, up: str, down: str
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns the names of tensors of which each expert has its own."""
    return (
        ("mlp.experts.gate_up_proj", (f"{module}.{gate}.weight", f"{module}.{up}.weight")),
        ("mlp.experts.down_proj", (f"{module}.{down}.weight",)),
    )


def _qwen(
    model_type: str, architecture: str, read_config: Callable, decoder: type[MoELlama]
) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        read_config=read_config,
        decoder=decoder,
        naming=Naming(
            prefix="model",
            blocks="layers",
            stored=by_expert("mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
        ),
    )


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read_config=read_mixtral,
    decoder=MoELlama,
    naming=Naming(
        prefix="model",
        blocks="layers",
        stored=(
            ("mlp.gate", ("block_sparse_moe.gate.weight",)),
            *by_expert("block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
        ),
    ),
)
QWEN2_MOE = _qwen("qwen2_moe", "Qwen2MoeForCausalLM", read_qwen2_moe, GatedExpertLlama)
QWEN3_MOE = _qwen("qwen3_moe", "Qwen3MoeForCausalLM", read_qwen3_moe, MoELlama)
