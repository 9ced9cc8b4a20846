"""Reads the `config.json` of gpt-oss."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given
from peft_jax.models.common_attributes import COMMON, SILU, read_layer_types, read_sizes
from peft_jax.models.experts import Routing
from peft_jax.models.family import Family
from peft_jax.models.gpt_oss import ClampedSwiGLU, GptOss, GptOssConfig
from peft_jax.models.moe_families import BALANCING
from peft_jax.models.naming import Naming
from peft_jax.models.rope_attributes import read_rotary

_GPT_OSS = AttributeTable(
    family="gpt_oss",
    architectures=frozenset({"GptOssForCausalLM", "GptOssModel"}),
    read=COMMON
    | {"attention_bias", "layer_types", "num_experts_per_tok", "num_local_experts"}
    | {"quantization_config", "sliding_window", "swiglu_alpha", "swiglu_limit"},
    # Published files repeat other attributes under the names of OpenAI's own code.
    irrelevant=BALANCING | {"experts_per_token", "initial_context_length"},
    fixed=SILU,
)

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Rope parameters in transformers where none are given."""


def read_gpt_oss(hf_config: Mapping[str, Any]) -> GptOssConfig:
    """Reads the configuration of gpt-oss: every other layer slides, and all are rotated by YaRN."""
    _GPT_OSS.check(hf_config)
    _check_packing(hf_config.get("quantization_config"))
    sizes = read_sizes(hf_config, head_dim=64, num_kv_heads=8, norm_epsilon=1e-5)
    if not (hf_config.get("rope_parameters") or hf_config.get("rope_scaling")):
        hf_config = {**hf_config, "rope_parameters": _YARN}
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"], default_theta=150000.0)
    default = [("sliding_attention", "full_attention")[n % 2] for n in range(sizes["num_layers"])]
    both = {"sliding_attention": rotary, "full_attention": rotary}
    window = hf_config.get("sliding_window", 128)
    bias = given(hf_config, "attention_bias", True)
    return GptOssConfig(
        layer_types=read_layer_types(hf_config, default, window=window, rotary=both),
        routing=Routing(
            num_experts=given(hf_config, "num_local_experts", 128),
            experts_per_token=given(hf_config, "num_experts_per_tok", 4),
            normalized=True,
        ),
        gate=ClampedSwiGLU(
            alpha=given(hf_config, "swiglu_alpha", 1.702),
            limit=given(hf_config, "swiglu_limit", 7.0),
        ),
        attention_sinks=True,
        qkv_bias=bias,
        output_bias=bias,
        **sizes,
    )


def _check_packing(settings: Mapping[str, Any] | None) -> None:
    """Raises ValueError if the checkpoint's kernels are packed in another format than MXFP4."""
    method = "mxfp4" if settings is None else settings.get("quant_method")
    if method != "mxfp4":
        raise ValueError(
            f"config.json sets quantization_config with quant_method = {method!r}; 'gpt_oss' models"
            " are read in bfloat16 and in mxfp4 only"
        )


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read_config=read_gpt_oss,
    decoder=GptOss,
    naming=Naming(prefix="model", blocks="layers", experts_conv1d=True),
)
