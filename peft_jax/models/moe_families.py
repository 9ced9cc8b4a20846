"""Reads the `config.json` of Mixtral and Qwen3 MoE."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.common_attributes import COMMON, SILU, read_sizes
from peft_jax.models.experts import Routing
from peft_jax.models.family import Family
from peft_jax.models.layer_types import LayerType
from peft_jax.models.moe_llama import MoELlama, MoELlamaConfig
from peft_jax.models.naming import Naming
from peft_jax.models.rope import read_rotary

BALANCING = frozenset({"output_router_logits", "router_aux_loss_coef"})
"""Attributes of the load-balancing loss, which is not part of the loss here."""

_MIXTRAL = AttributeTable(
    family="mixtral",
    architectures=frozenset({"MixtralForCausalLM", "MixtralModel"}),
    read=COMMON | {"num_experts_per_tok", "num_local_experts", "sliding_window"},
    irrelevant=BALANCING,
    fixed=SILU | {"router_jitter_noise": (0.0,)},
)
_QWEN3_MOE = AttributeTable(
    family="qwen3_moe",
    architectures=frozenset({"Qwen3MoeForCausalLM", "Qwen3MoeModel"}),
    read=COMMON
    | {"attention_bias", "moe_intermediate_size", "norm_topk_prob", "num_experts"}
    | {"num_experts_per_tok", "num_local_experts", "sliding_window", "use_sliding_window"},
    irrelevant=BALANCING | {"max_window_layers"},
    # Layers with an MLP in place of experts have parameters of other shapes, which do not stack.
    fixed=SILU | {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
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


def read_qwen3_moe(hf_config: Mapping[str, Any]) -> MoELlamaConfig:
    """Reads the configuration of Qwen3 MoE: the attention of Qwen3, and experts in all layers."""
    _QWEN3_MOE.check(hf_config)
    features = require(hf_config, "moe_intermediate_size")
    sizes = read_sizes({**hf_config, "intermediate_size": features}, num_kv_heads=4)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"])
    window = hf_config.get("sliding_window", 4096)
    if not given(hf_config, "use_sliding_window", False):
        window = None
    # transformers 5 renames num_experts.
    experts = given(hf_config, "num_local_experts", given(hf_config, "num_experts", 128))
    routing = Routing(
        num_experts=experts,
        experts_per_token=given(hf_config, "num_experts_per_tok", 8),
        normalized=given(hf_config, "norm_topk_prob", False),
    )
    bias = given(hf_config, "attention_bias", False)
    return MoELlamaConfig(
        layer_types=(LayerType(window=window, rotary=rotary),),
        routing=routing,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        **sizes,
    )


def _by_expert(
    module: str, gate: str, up: str, down: str
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns the names of tensors of which each expert has its own."""
    return (
        ("mlp.experts.gate_up_proj", (f"{module}.{gate}.weight", f"{module}.{up}.weight")),
        ("mlp.experts.down_proj", (f"{module}.{down}.weight",)),
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
            *_by_expert("block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
        ),
    ),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read_config=read_qwen3_moe,
    decoder=MoELlama,
    naming=Naming(
        prefix="model",
        blocks="layers",
        stored=_by_expert("mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj"),
    ),
)
