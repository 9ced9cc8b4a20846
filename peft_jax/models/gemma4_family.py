"""Reads the `config.json` of Gemma 4, alone and with images and sound."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.common_attributes import COMMON, read_layer_types, read_sizes
from peft_jax.models.family import Family
from peft_jax.models.gemma4 import FULL, SLIDING, Gemma4, Gemma4Config
from peft_jax.models.layer_types import LayerType
from peft_jax.models.logit_rule import LogitRule
from peft_jax.models.naming import Naming
from peft_jax.models.rope import RotarySettings
from peft_jax.models.rope_attributes import read_rotary

_GEMMA4_TEXT = AttributeTable(
    family="gemma4_text",
    architectures=frozenset({"Gemma4ForCausalLM", "Gemma4TextModel"}),
    read=COMMON
    | {"attention_bias", "attention_k_eq_v", "final_logit_softcapping", "global_head_dim"}
    | {"layer_types", "num_global_key_value_heads", "per_layer_config", "sliding_window"},
    irrelevant=frozenset({"cache_implementation", "moe_intermediate_size", "num_experts"})
    | {"top_k_experts", "use_double_wide_mlp", "vocab_size_per_layer_input"},
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        # Embeddings that each layer adds, shared keys and values, and experts.
        "hidden_size_per_layer_input": (0,),
        "num_kv_shared_layers": (0,),
        "enable_moe_block": (False,),
        # Images attend to themselves both ways; texts do not.
        "use_bidirectional_attention": ("vision",),
    },
)
_GEMMA4 = AttributeTable(
    family="gemma4",
    architectures=frozenset({"Gemma4ForConditionalGeneration", "Gemma4Model"}),
    read=frozenset({"text_config", "tie_word_embeddings"}),
    irrelevant=frozenset({"audio_config", "audio_token_id", "boa_token_id", "boi_token_id"})
    | {"eoa_token_id", "eoa_token_index", "eoi_token_id", "image_token_id", "initializer_range"}
    | {"video_token_id", "vision_config", "vision_soft_tokens_per_image"},
)

_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
}
"""Defaults in transformers, which omits equal attributes of a part of a `config.json`."""

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
    },
}
"""Rope parameters in transformers where none are given."""

_PER_LAYER = ("head_dim", "num_key_value_heads")


def read_gemma4_text(hf_config: Mapping[str, Any]) -> Gemma4Config:
    """Reads the configuration of Gemma 4's language model: five layers slide for each other one.

    Raises:
      ValueError: An attribute is not understood, or the model is not dense.
    """
    _GEMMA4_TEXT.check(hf_config)
    added = hf_config.get("hidden_size_per_layer_input", 256)
    if added:
        raise ValueError(
            f"config.json sets hidden_size_per_layer_input = {added} (256 where it is absent);"
            " 'gemma4_text' models are implemented for hidden_size_per_layer_input = 0 only,"
            " without embeddings of their own for each layer"
        )
    sizes = read_sizes(hf_config, head_dim=256, num_kv_heads=4, tied=True)
    count = sizes["num_layers"]
    default = ["full_attention" if (n + 1) % 6 == 0 else "sliding_attention" for n in range(count)]
    names = list(given(hf_config, "layer_types", default))
    if names:
        # As in transformers.
        names[-1] = "full_attention"
    shares = given(hf_config, "attention_k_eq_v", False)
    kv_heads, head_dim = _read_full_heads(hf_config, names, sizes, shares=shares)
    rotary = _read_rotary(
        hf_config, {"sliding_attention": sizes["head_dim"], "full_attention": head_dim}
    )
    window = hf_config.get("sliding_window", 512)
    types = read_layer_types(
        {**hf_config, "layer_types": names}, names, window=window, rotary=rotary
    )
    return Gemma4Config(
        layer_types=tuple(_with_form(kind) for kind in types),
        attention_bias=given(hf_config, "attention_bias", False),
        full_kv_heads=kv_heads,
        full_head_dim=head_dim,
        full_shares_values=shares,
        score_scale=1.0,
        logit_rule=LogitRule(cap=hf_config.get("final_logit_softcapping")),
        **sizes,
    )


def _with_form(kind: LayerType) -> LayerType:
    form = FULL if kind.window is None else SLIDING
    return LayerType(form=form, window=kind.window, rotary=kind.rotary)


def _read_full_heads(
    hf_config: Mapping[str, Any], names: list[str], sizes: Mapping[str, Any], *, shares: bool
) -> tuple[int, int]:
    """Returns the number of key-value heads of layers with full attention, and their dimension.

    Published files have attributes for them. Those that transformers writes list what differs by
    layer.

    Raises:
      ValueError: Layers of one type differ, or in an attribute that is not implemented.
    """
    per_layer = hf_config.get("per_layer_config")
    if per_layer is None:
        heads = hf_config.get("num_global_key_value_heads") if shares else None
        return heads or sizes["num_kv_heads"], given(hf_config, "global_head_dim", 512)
    found = {int(layer): dict(values) for layer, values in per_layer.items()}
    of_types = {
        name: [found.get(layer, {}) for layer, own in enumerate(names) if own == name]
        for name in ("sliding_attention", "full_attention")
    }
    full = of_types["full_attention"][0] if of_types["full_attention"] else {}
    if any(of_types["sliding_attention"]) or any(one != full for one in of_types["full_attention"]):
        raise ValueError(
            "config.json sets per_layer_config in which layers of one type differ, or sliding"
            " layers differ from the model; only layers of full attention may, all alike"
        )
    if unknown := sorted(set(full) - set(_PER_LAYER)):
        raise ValueError(
            f"config.json sets per_layer_config with {', '.join(unknown)}, but only"
            f" {' and '.join(_PER_LAYER)} are implemented"
        )
    return (
        given(full, "num_key_value_heads", sizes["num_kv_heads"]),
        given(full, "head_dim", sizes["head_dim"]),
    )


def _read_rotary(
    hf_config: Mapping[str, Any], head_dims: Mapping[str, int]
) -> dict[str, RotarySettings]:
    """Reads the rotary embedding of each type of layer."""
    by_type = {**_ROPE, **given(hf_config, "rope_parameters", {})}
    if unknown := sorted(set(by_type) - set(_ROPE)):
        raise ValueError(
            f"config.json's rope_parameters set {', '.join(unknown)}, but must have parameters for"
            f" {' and '.join(_ROPE)}"
        )
    sizes = {"max_position_embeddings": hf_config.get("max_position_embeddings")}
    return {
        name: read_rotary({**sizes, "rope_parameters": by_type[name]}, head_dim=dim)
        for name, dim in head_dims.items()
    }


def read_gemma4(hf_config: Mapping[str, Any]) -> Gemma4Config:
    """Reads the configuration of the language model of a Gemma 4 with images and sound."""
    _GEMMA4.check(hf_config)
    tied = given(hf_config, "tie_word_embeddings", True)
    text = {**_DEFAULTS, **require(hf_config, "text_config")}
    return read_gemma4_text({**text, "tie_word_embeddings": tied})


_RENAMED = (("full_attn", "self_attn"),)

GEMMA4_TEXT = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    read_config=read_gemma4_text,
    decoder=Gemma4,
    naming=Naming(prefix="model", blocks="layers", renamed=_RENAMED),
)
GEMMA4 = Family(
    model_type="gemma4",
    architecture="Gemma4ForConditionalGeneration",
    read_config=read_gemma4,
    decoder=Gemma4,
    naming=Naming(prefix="model.language_model", blocks="layers", renamed=_RENAMED),
    unused=(r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\..*",),
    text_part="text_config",
    text_defaults=tuple(_DEFAULTS.items()),
    alone=GEMMA4_TEXT,
)
