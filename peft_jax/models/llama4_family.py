"""Reads the `config.json` of Llama 4, alone and with images."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.common_attributes import COMMON, SILU, read_sizes
from peft_jax.models.family import Family
from peft_jax.models.layer_types import LayerType, Temperature, shortest_cycle
from peft_jax.models.llama4 import Llama4, Llama4Config, SigmoidRouting
from peft_jax.models.moe_families import BALANCING
from peft_jax.models.moe_llama import DENSE, EXPERTS
from peft_jax.models.naming import Naming
from peft_jax.models.rope_attributes import read_rotary

_LLAMA4_TEXT = AttributeTable(
    family="llama4_text",
    architectures=frozenset({"Llama4ForCausalLM", "Llama4TextModel"}),
    read=COMMON
    | {"attention_bias", "attention_chunk_size", "attn_scale", "attn_temperature_tuning"}
    | {"floor_scale", "interleave_moe_layer_step", "intermediate_size_mlp", "layer_types"}
    | {"moe_layers", "no_rope_layer_interval", "no_rope_layers", "num_experts_per_tok"}
    | {"num_local_experts", "use_qk_norm"},
    irrelevant=BALANCING | {"cache_implementation", "for_llm_compressor"},
    fixed=SILU | {"router_jitter_noise": (0.0,)},
)
_LLAMA4 = AttributeTable(
    family="llama4",
    architectures=frozenset({"Llama4ForConditionalGeneration"}),
    read=frozenset({"text_config", "tie_word_embeddings"}),
    irrelevant=frozenset({"boi_token_index", "eoi_token_index", "image_token_index"})
    | {"initializer_range", "vision_config"},
)

_DEFAULTS = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "max_position_embeddings": 131072,
}
"""Defaults in transformers, which omits equal attributes of a part of a `config.json`."""


def read_llama4_text(hf_config: Mapping[str, Any]) -> Llama4Config:
    """Reads the configuration of Llama 4's language model."""
    _LLAMA4_TEXT.check(hf_config)
    sizes = read_sizes(
        {**hf_config, "intermediate_size": require(hf_config, "intermediate_size_mlp")},
        head_dim=128,
        num_kv_heads=8,
        norm_epsilon=1e-5,
    )
    bias = given(hf_config, "attention_bias", False)
    return Llama4Config(
        layer_types=_read_types(hf_config, sizes["num_layers"], sizes["head_dim"]),
        routing=SigmoidRouting(
            num_experts=given(hf_config, "num_local_experts", 16),
            experts_per_token=given(hf_config, "num_experts_per_tok", 1),
        ),
        expert_size=require(hf_config, "intermediate_size"),
        unit_qk=given(hf_config, "use_qk_norm", True),
        qkv_bias=bias,
        output_bias=bias,
        **sizes,
    )


def _read_types(hf_config: Mapping[str, Any], count: int, head_dim: int) -> tuple[LayerType, ...]:
    """Reads which layers are rotated, attend within chunks, and have experts.

    Raises:
      ValueError: A list has another number of layers, or a layer's type is not known.
    """
    interval = given(hf_config, "no_rope_layer_interval", 4)
    # As in transformers, an empty list means the default.
    turned = hf_config.get("no_rope_layers") or [
        int((layer + 1) % interval != 0) for layer in range(count)
    ]
    chunk = hf_config.get("attention_chunk_size", 8192)
    default = [
        "chunked_attention" if turns and chunk is not None else "full_attention" for turns in turned
    ]
    names = given(hf_config, "layer_types", default)
    for name, values in (("no_rope_layers", turned), ("layer_types", names)):
        if len(values) != count:
            raise ValueError(
                f"config.json sets {name} of {len(values)} layers, but num_hidden_layers = {count}"
            )
    if unknown := sorted(set(names) - {"chunked_attention", "full_attention"}):
        raise ValueError(
            f"config.json sets layer_types with {', '.join(map(repr, unknown))}, but only"
            " chunked_attention and full_attention are implemented"
        )
    if chunk is None and "chunked_attention" in names:
        raise ValueError(
            "config.json sets layer_types with chunked_attention, but attention_chunk_size is null"
        )
    every = given(hf_config, "interleave_moe_layer_step", 1)
    sparse = given(hf_config, "moe_layers", list(range(every - 1, count, every)))
    rotary = read_rotary(hf_config, head_dim=head_dim, default_theta=500000.0)
    temperature = None
    if given(hf_config, "attn_temperature_tuning", True):
        temperature = Temperature(
            slope=given(hf_config, "attn_scale", 0.1),
            step=given(hf_config, "floor_scale", 8192),
            first=1,
        )
    return shortest_cycle(
        [
            LayerType(
                form=EXPERTS if layer in sparse else DENSE,
                chunk=chunk if names[layer] == "chunked_attention" else None,
                rotary=rotary if turned[layer] else None,
                temperature=None if turned[layer] else temperature,
            )
            for layer in range(count)
        ]
    )


def read_llama4(hf_config: Mapping[str, Any]) -> Llama4Config:
    """Reads the configuration of the language model of a Llama 4 that also reads images."""
    _LLAMA4.check(hf_config)
    tied = given(hf_config, "tie_word_embeddings", False)
    text = {**_DEFAULTS, **require(hf_config, "text_config")}
    return read_llama4_text({**text, "tie_word_embeddings": tied})


def _naming(prefix: str) -> Naming:
    # PEFT is not told that experts' kernels are stored [in, out].
    return Naming(prefix=prefix, blocks="layers", experts_conv1d=True, experts_swapped=True)


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    read_config=read_llama4_text,
    decoder=Llama4,
    naming=_naming("model"),
)
LLAMA4 = Family(
    model_type="llama4",
    architecture="Llama4ForConditionalGeneration",
    read_config=read_llama4,
    decoder=Llama4,
    naming=_naming("language_model.model"),
    unused=(r"(vision_model|multi_modal_projector)\..*",),
    old_prefixes=(("language_model.lm_head.", "lm_head."),),
    text_part="text_config",
    text_defaults=tuple(_DEFAULTS.items()),
    alone=LLAMA4_TEXT,
)
