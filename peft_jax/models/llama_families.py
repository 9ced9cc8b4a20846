"""Reads the `config.json` of each member of the Llama family."""

from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.family import Family
from peft_jax.models.llama import Llama, LlamaConfig
from peft_jax.models.naming import Naming
from peft_jax.models.rope import ROTARY_ATTRIBUTES, read_rotary

_COMMON = ROTARY_ATTRIBUTES | {
    "head_dim",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
}
_SILU = {"hidden_act": ("silu", "swish")}

_LLAMA = AttributeTable(
    family="llama",
    architectures=frozenset({"LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"}),
    read=_COMMON | {"attention_bias", "mlp_bias"},
    irrelevant=frozenset({"is_llama_config"}),
    fixed=_SILU | {"rope_interleaved": (False,), "sliding_window": ()},
)
_MISTRAL = AttributeTable(
    family="mistral",
    architectures=frozenset({"MistralForCausalLM", "MistralModel"}),
    read=_COMMON | {"sliding_window"},
    fixed=_SILU | {"attention_bias": (False,), "mlp_bias": (False,)},
)
_WINDOWED = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})
_QWEN2 = AttributeTable(
    family="qwen2",
    architectures=frozenset({"Qwen2ForCausalLM", "Qwen2Model"}),
    read=_COMMON | _WINDOWED,
    fixed=_SILU | {"use_mrope": (False,)},
)
_QWEN3 = AttributeTable(
    family="qwen3",
    architectures=frozenset({"Qwen3ForCausalLM", "Qwen3Model"}),
    read=_COMMON | _WINDOWED | {"attention_bias"},
    fixed=_SILU,
)


def read_llama(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Llama 1 to 3 and Vicuna."""
    _LLAMA.check(hf_config)
    bias = given(hf_config, "attention_bias", False)
    return _read_common(
        hf_config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=given(hf_config, "mlp_bias", False),
    )


def read_mistral(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Mistral: all layers have the same sliding window, if any."""
    _MISTRAL.check(hf_config)
    return _read_common(
        hf_config,
        num_kv_heads=given(hf_config, "num_key_value_heads", 8),
        # As in transformers, an absent window means 4096, and null means no window.
        sliding_window=hf_config.get("sliding_window", 4096),
    )


def read_qwen2(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Qwen2: biases on queries, keys and values."""
    _QWEN2.check(hf_config)
    return _read_common(hf_config, qkv_bias=True, sliding_window=_uniform_window(hf_config))


def read_qwen3(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Qwen3: norms on queries and keys, an explicit head dimension."""
    _QWEN3.check(hf_config)
    bias = given(hf_config, "attention_bias", False)
    return _read_common(
        hf_config,
        head_dim=given(hf_config, "head_dim", 128),
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        sliding_window=_uniform_window(hf_config),
    )


def _read_common(hf_config: Mapping[str, Any], **others: Any) -> LlamaConfig:
    hidden_size = require(hf_config, "hidden_size")
    num_heads = require(hf_config, "num_attention_heads")
    head_dim = others.pop("head_dim", None) or given(
        hf_config, "head_dim", hidden_size // num_heads
    )
    if hf_config.get("head_dim") is None and "head_dim" not in others and hidden_size % num_heads:
        raise ValueError(
            f"config.json sets no head_dim, and hidden_size = {hidden_size} is not a multiple of"
            f" num_attention_heads = {num_heads}"
        )
    settings = {
        "vocab_size": require(hf_config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": require(hf_config, "intermediate_size"),
        "num_layers": require(hf_config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": given(hf_config, "num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "rotary": read_rotary(hf_config, head_dim=head_dim),
        "norm_epsilon": given(hf_config, "rms_norm_eps", 1e-6),
        "max_positions": given(hf_config, "max_position_embeddings", 2048),
        "tie_word_embeddings": given(hf_config, "tie_word_embeddings", False),
        "initializer_range": given(hf_config, "initializer_range", 0.02),
    }
    return LlamaConfig(**{**settings, **others})


def _uniform_window(hf_config: Mapping[str, Any]) -> int | None:
    """Returns Qwen's sliding window, which must be the same in all layers.

    Raises:
      ValueError: Some layers have a window and others do not.
    """
    layers = require(hf_config, "num_hidden_layers")
    # As in transformers, an absent window means 4096, null means none, and only
    # use_sliding_window enables it.
    window = hf_config.get("sliding_window", 4096)
    if not given(hf_config, "use_sliding_window", False):
        window = None
    full_layers = given(hf_config, "max_window_layers", 28)
    types = hf_config.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= full_layers else "full_attention"
        for layer in range(layers)
    ]
    if len(types) != layers:
        raise ValueError(
            f"config.json sets layer_types of {len(types)} layers, but num_hidden_layers = {layers}"
        )
    if set(types) == {"full_attention"}:
        return None
    if set(types) == {"sliding_attention"} and window is not None:
        return window
    raise ValueError(
        f"config.json mixes the layer types {', '.join(sorted(set(types)))} (layer_types,"
        " max_window_layers, use_sliding_window), but all layers must have the same type"
    )


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
QWEN2 = _family("qwen2", "Qwen2ForCausalLM", read_qwen2)
QWEN3 = _family("qwen3", "Qwen3ForCausalLM", read_qwen3)
