"""Reads the `config.json` of each member of the Llama family."""

from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.common_attributes import COMMON, SILU, read_layer_types, read_sizes
from peft_jax.models.family import Family
from peft_jax.models.layer_types import LayerType, shortest_cycle
from peft_jax.models.llama import Llama, LlamaConfig
from peft_jax.models.logit_rule import LogitRule
from peft_jax.models.naming import Naming
from peft_jax.models.rope_attributes import read_rotary

_LLAMA = AttributeTable(
    family="llama",
    unpacks=True,
    architectures=frozenset({"LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"}),
    read=COMMON | {"attention_bias", "mlp_bias"},
    irrelevant=frozenset({"is_llama_config"}),
    fixed=SILU | {"rope_interleaved": (False,), "sliding_window": ()},
)
_MISTRAL = AttributeTable(
    family="mistral",
    unpacks=True,
    architectures=frozenset({"MistralForCausalLM", "MistralModel"}),
    read=COMMON | {"sliding_window"},
    fixed=SILU | {"attention_bias": (False,), "mlp_bias": (False,)},
)
_MISTRAL3 = AttributeTable(
    family="mistral3",
    architectures=frozenset({"Mistral3ForConditionalGeneration", "Mistral3Model"}),
    read=frozenset({"text_config", "tie_word_embeddings"}),
    irrelevant=frozenset({"image_token_index", "initializer_range", "multimodal_projector_bias"})
    | {"projector_hidden_act", "spatial_merge_size", "vision_config", "vision_feature_layer"},
)
_MINISTRAL = AttributeTable(
    family="ministral",
    unpacks=True,
    architectures=frozenset({"MinistralForCausalLM", "MinistralModel"}),
    read=COMMON | {"layer_types", "sliding_window"},
    fixed=SILU,
)
_WINDOWED = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})
_QWEN2 = AttributeTable(
    family="qwen2",
    unpacks=True,
    architectures=frozenset({"Qwen2ForCausalLM", "Qwen2Model"}),
    read=COMMON | _WINDOWED,
    fixed=SILU | {"use_mrope": (False,)},
)
_QWEN3 = AttributeTable(
    family="qwen3",
    unpacks=True,
    architectures=frozenset({"Qwen3ForCausalLM", "Qwen3Model"}),
    read=COMMON | _WINDOWED | {"attention_bias"},
    fixed=SILU,
)
_SMOLLM3 = AttributeTable(
    family="smollm3",
    unpacks=True,
    architectures=frozenset({"SmolLM3ForCausalLM", "SmolLM3Model"}),
    read=COMMON
    | {"attention_bias", "layer_types", "mlp_bias", "no_rope_layer_interval", "no_rope_layers"}
    | {"sliding_window", "use_sliding_window"},
    irrelevant=frozenset({"max_window_layers"}),
    fixed=SILU,
)
_GRANITE = AttributeTable(
    family="granite",
    unpacks=True,
    architectures=frozenset({"GraniteForCausalLM", "GraniteModel"}),
    read=COMMON
    | {"attention_bias", "attention_multiplier", "embedding_multiplier", "logits_scaling"}
    | {"mlp_bias", "residual_multiplier"},
    # Dropout is for training without adapters only.
    irrelevant=frozenset({"attention_dropout"}),
    fixed=SILU,
)


_MISTRAL_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
}
"""Defaults in transformers, which omits equal attributes of a part of a `config.json`."""


def read_llama(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Llama 1 to 3 and Vicuna."""
    _LLAMA.check(hf_config)
    return _read_uniform(hf_config, **_read_biases(hf_config))


def read_mistral(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Mistral: all layers have the same sliding window, if any."""
    _MISTRAL.check(hf_config)
    # As in transformers, an absent window means 4096, and null means no window.
    window = hf_config.get("sliding_window", 4096)
    return _read_uniform(hf_config, num_kv_heads=8, window=window)


def read_mistral3(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of the language model of a Mistral that also reads images.

    Raises:
      ValueError: An attribute is not understood, or the language model is not a Mistral.
    """
    _MISTRAL3.check(hf_config)
    text = {**_MISTRAL_DEFAULTS, **require(hf_config, "text_config")}
    if text.get("model_type", "mistral") != "mistral":
        raise ValueError(
            f"config.json's text_config sets model_type = {text['model_type']!r}; 'mistral3' models"
            " are implemented for model_type = 'mistral' only"
        )
    tied = given(hf_config, "tie_word_embeddings", given(text, "tie_word_embeddings", False))
    return read_mistral({**text, "tie_word_embeddings": tied})


def read_ministral(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Ministral: some layers slide."""
    _MINISTRAL.check(hf_config)
    sizes = read_sizes(hf_config, num_kv_heads=8)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"])
    window = hf_config.get("sliding_window", 4096)
    default = ["full_attention" if window is None else "sliding_attention"] * sizes["num_layers"]
    both = {"sliding_attention": rotary, "full_attention": rotary}
    types = read_layer_types(hf_config, default, window=window, rotary=both)
    return LlamaConfig(layer_types=types, **sizes)


def read_qwen2(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Qwen2: biases on queries, keys and values."""
    _QWEN2.check(hf_config)
    return _read_qwen(hf_config, read_sizes(hf_config), qkv_bias=True)


def read_qwen3(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Qwen3: norms on queries and keys, an explicit head dimension."""
    _QWEN3.check(hf_config)
    bias = given(hf_config, "attention_bias", False)
    sizes = read_sizes(hf_config, head_dim=128)
    return _read_qwen(hf_config, sizes, qk_norm=True, qkv_bias=bias, output_bias=bias)


def read_smollm3(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of SmolLM3: some layers have no rotary embedding."""
    _SMOLLM3.check(hf_config)
    sizes = read_sizes(hf_config, num_kv_heads=4, tied=True)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"], default_theta=2000000.0)
    interval = given(hf_config, "no_rope_layer_interval", 4)
    turned = given(
        hf_config,
        "no_rope_layers",
        [int((layer + 1) % interval != 0) for layer in range(sizes["num_layers"])],
    )
    if len(turned) < sizes["num_layers"]:
        raise ValueError(
            f"config.json sets no_rope_layers of {len(turned)} layers, but num_hidden_layers ="
            f" {sizes['num_layers']}"
        )
    window = hf_config.get("sliding_window")
    slides = given(hf_config, "use_sliding_window", False) and window is not None
    default = [
        "sliding_attention" if slides and not turns else "full_attention"
        for turns in turned[: sizes["num_layers"]]
    ]
    both = {"sliding_attention": rotary, "full_attention": rotary}
    windows = read_layer_types(hf_config, default, window=window, rotary=both)
    types = [
        LayerType(window=windows[layer % len(windows)].window, rotary=rotary if turns else None)
        for layer, turns in enumerate(turned[: sizes["num_layers"]])
    ]
    return LlamaConfig(layer_types=shortest_cycle(types), **sizes, **_read_biases(hf_config))


def read_granite(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Granite: multipliers of embeddings, residuals and logits."""
    _GRANITE.check(hf_config)
    return _read_uniform(
        hf_config,
        score_scale=given(hf_config, "attention_multiplier", 1.0),
        embedding_scale=given(hf_config, "embedding_multiplier", 1.0),
        residual_scale=given(hf_config, "residual_multiplier", 1.0),
        logit_rule=LogitRule(divisor=given(hf_config, "logits_scaling", 1.0)),
        **_read_biases(hf_config),
    )


def _read_uniform(
    hf_config: Mapping[str, Any],
    *,
    num_kv_heads: int | None = None,
    window: int | None = None,
    **others: Any,
) -> LlamaConfig:
    """Reads a configuration whose layers are all of one type."""
    sizes = read_sizes(hf_config, num_kv_heads=num_kv_heads)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"])
    layer = LayerType(window=window, rotary=rotary)
    return LlamaConfig(layer_types=(layer,), **sizes, **others)


def _read_biases(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    bias = given(hf_config, "attention_bias", False)
    mlp_bias = given(hf_config, "mlp_bias", False)
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": mlp_bias}


def _read_qwen(
    hf_config: Mapping[str, Any], sizes: Mapping[str, Any], **others: Any
) -> LlamaConfig:
    """Reads Qwen's sliding windows, which the last layers may have."""
    layers = require(hf_config, "num_hidden_layers")
    # As in transformers, an absent window means 4096, null means none, and only
    # use_sliding_window enables it.
    window = hf_config.get("sliding_window", 4096)
    if not given(hf_config, "use_sliding_window", False):
        window = None
    full_layers = given(hf_config, "max_window_layers", 28)
    default = [
        "sliding_attention" if window is not None and layer >= full_layers else "full_attention"
        for layer in range(layers)
    ]
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"])
    both = {"sliding_attention": rotary, "full_attention": rotary}
    types = read_layer_types(hf_config, default, window=window, rotary=both)
    return LlamaConfig(layer_types=types, **sizes, **others)


def _family(model_type: str, architecture: str, read_config: Callable) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        read_config=read_config,
        decoder=Llama,
        naming=Naming(prefix="model", blocks="layers"),
    )


LLAMA = _family("llama", "LlamaForCausalLM", read_llama)
MISTRAL = _family("mistral", "MistralForCausalLM", read_mistral)
MISTRAL3 = Family(
    model_type="mistral3",
    architecture="Mistral3ForConditionalGeneration",
    read_config=read_mistral3,
    decoder=Llama,
    naming=Naming(prefix="model.language_model", blocks="layers"),
    unused=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
    old_prefixes=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ),
    text_part="text_config",
    text_defaults=tuple(_MISTRAL_DEFAULTS.items()),
    alone=MISTRAL,
)
MINISTRAL = _family("ministral", "MinistralForCausalLM", read_ministral)
QWEN2 = _family("qwen2", "Qwen2ForCausalLM", read_qwen2)
QWEN3 = _family("qwen3", "Qwen3ForCausalLM", read_qwen3)
SMOLLM3 = _family("smollm3", "SmolLM3ForCausalLM", read_smollm3)
GRANITE = _family("granite", "GraniteForCausalLM", read_granite)
