"""Reads the `config.json` of Gemma 1, 2 and 3."""

from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.common_attributes import COMMON, read_layer_types, read_sizes
from peft_jax.models.family import Family
from peft_jax.models.gemma import Gemma, Gemma1, GemmaConfig
from peft_jax.models.layer_types import LayerType
from peft_jax.models.logit_rule import LogitRule
from peft_jax.models.naming import Naming
from peft_jax.models.rope_attributes import read_rotary, read_rotary_by_type

_READ = COMMON | {"attention_bias"}
_WINDOWED = frozenset({"layer_types", "query_pre_attn_scalar", "sliding_window"})
# Gemma means GELU's tanh form by "gelu" too. Gemma 2 and 3 ignore hidden_act.
_GELU = {
    "hidden_act": ("gelu", "gelu_pytorch_tanh"),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False,),
}
_CACHES = frozenset({"cache_implementation"})

_GEMMA = AttributeTable(
    family="gemma",
    architectures=frozenset({"GemmaForCausalLM", "GemmaModel"}),
    read=_READ,
    fixed=_GELU,
)
_GEMMA2 = AttributeTable(
    family="gemma2",
    architectures=frozenset({"Gemma2ForCausalLM", "Gemma2Model"}),
    read=_READ | _WINDOWED | {"attn_logit_softcapping", "final_logit_softcapping"},
    irrelevant=_CACHES,
    fixed=_GELU,
)
_GEMMA3 = AttributeTable(
    family="gemma3_text",
    architectures=frozenset({"Gemma3ForCausalLM", "Gemma3TextModel"}),
    read=_READ
    | _WINDOWED
    | {"final_logit_softcapping", "rope_local_base_freq", "sliding_window_pattern"},
    irrelevant=_CACHES,
    # transformers reads attn_logit_softcapping, but caps no scores by it.
    fixed=_GELU | {"attn_logit_softcapping": ()},
)

_GEMMA3_WITH_IMAGES = AttributeTable(
    family="gemma3",
    architectures=frozenset({"Gemma3ForConditionalGeneration", "Gemma3Model"}),
    read=frozenset({"text_config", "tie_word_embeddings"}),
    irrelevant=frozenset({"boi_token_index", "eoi_token_index", "image_token_index"})
    | {"initializer_range", "mm_tokens_per_image", "vision_config"},
)

_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
}
"""Defaults in transformers, which omits equal attributes of a part of a `config.json`."""


def read_gemma(hf_config: Mapping[str, Any]) -> GemmaConfig:
    """Reads the configuration of Gemma 1."""
    _GEMMA.check(hf_config)
    sizes = read_sizes(hf_config, head_dim=256, num_kv_heads=16, tied=True)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"])
    bias = given(hf_config, "attention_bias", False)
    layer = LayerType(rotary=rotary)
    return GemmaConfig(layer_types=(layer,), attention_bias=bias, **sizes)


def read_gemma2(hf_config: Mapping[str, Any]) -> GemmaConfig:
    """Reads the configuration of Gemma 2: every other layer slides, scores and logits are capped.

    As in transformers, an absent cap means 50 for scores and 30 for logits, and null means none.
    """
    _GEMMA2.check(hf_config)
    sizes = read_sizes(hf_config, head_dim=256, num_kv_heads=4, tied=True)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"])
    default = [("sliding_attention", "full_attention")[n % 2] for n in range(sizes["num_layers"])]
    both = {"sliding_attention": rotary, "full_attention": rotary}
    window = hf_config.get("sliding_window", 4096)
    return GemmaConfig(
        layer_types=read_layer_types(hf_config, default, window=window, rotary=both),
        score_cap=hf_config.get("attn_logit_softcapping", 50.0),
        logit_rule=LogitRule(cap=hf_config.get("final_logit_softcapping", 30.0)),
        **_read_scale(hf_config),
        **sizes,
    )


def read_gemma3(hf_config: Mapping[str, Any]) -> GemmaConfig:
    """Reads the configuration of Gemma 3's text model: five layers slide for each that does not."""
    hf_config = {**_GEMMA3_DEFAULTS, **hf_config}
    _GEMMA3.check(hf_config)
    sizes = read_sizes(hf_config, head_dim=256, num_kv_heads=4, tied=True)
    rotary = read_rotary_by_type(
        hf_config,
        head_dim=sizes["head_dim"],
        thetas={"full_attention": 1000000.0, "sliding_attention": 10000.0},
    )
    every = given(hf_config, "sliding_window_pattern", 6)
    default = [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(sizes["num_layers"])
    ]
    window = hf_config.get("sliding_window", 4096)
    return GemmaConfig(
        layer_types=read_layer_types(hf_config, default, window=window, rotary=rotary),
        logit_rule=LogitRule(cap=hf_config.get("final_logit_softcapping")),
        qk_norm=True,
        **_read_scale(hf_config),
        **sizes,
    )


def read_gemma3_with_images(hf_config: Mapping[str, Any]) -> GemmaConfig:
    """Reads the configuration of the language model of a Gemma 3 that also reads images."""
    _GEMMA3_WITH_IMAGES.check(hf_config)
    tied = given(hf_config, "tie_word_embeddings", True)
    return read_gemma3({**require(hf_config, "text_config"), "tie_word_embeddings": tied})


def _read_scale(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "score_scale": given(hf_config, "query_pre_attn_scalar", 256) ** -0.5,
        "attention_bias": given(hf_config, "attention_bias", False),
    }


def _family(
    model_type: str, architecture: str, read_config: Callable, decoder: type[Gemma]
) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        read_config=read_config,
        decoder=decoder,
        naming=Naming(prefix="model", blocks="layers"),
    )


GEMMA = _family("gemma", "GemmaForCausalLM", read_gemma, Gemma1)
GEMMA2 = _family("gemma2", "Gemma2ForCausalLM", read_gemma2, Gemma)
GEMMA3 = _family("gemma3_text", "Gemma3ForCausalLM", read_gemma3, Gemma)
GEMMA3_WITH_IMAGES = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    read_config=read_gemma3_with_images,
    decoder=Gemma,
    naming=Naming(prefix="model.language_model", blocks="layers"),
    unused=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
    old_prefixes=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ),
    text_part="text_config",
    alone=GEMMA3,
)
