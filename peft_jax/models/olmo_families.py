"""Reads the `config.json` of OLMo 2 and 3."""

from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given
from peft_jax.models.common_attributes import COMMON, SILU, read_layer_types, read_sizes
from peft_jax.models.family import Family
from peft_jax.models.layer_types import LayerType
from peft_jax.models.naming import Naming
from peft_jax.models.olmo import Olmo, OlmoConfig
from peft_jax.models.rope_attributes import read_rotary, read_rotary_by_type

_OLMO2 = AttributeTable(
    family="olmo2",
    architectures=frozenset({"Olmo2ForCausalLM", "Olmo2Model"}),
    read=COMMON | {"attention_bias"},
    fixed=SILU,
)
_OLMO3 = AttributeTable(
    family="olmo3",
    architectures=frozenset({"Olmo3ForCausalLM", "Olmo3Model"}),
    read=COMMON | {"attention_bias", "layer_types", "sliding_window"},
    fixed=SILU,
)


def read_olmo2(hf_config: Mapping[str, Any]) -> OlmoConfig:
    """Reads the configuration of OLMo 2."""
    _OLMO2.check(hf_config)
    sizes = read_sizes(hf_config, norm_epsilon=1e-5)
    layer = LayerType(rotary=read_rotary(hf_config, head_dim=sizes["head_dim"]))
    bias = given(hf_config, "attention_bias", False)
    return OlmoConfig(layer_types=(layer,), attention_bias=bias, **sizes)


def read_olmo3(hf_config: Mapping[str, Any]) -> OlmoConfig:
    """Reads the configuration of OLMo 3: three layers slide, without rope scaling, of each four."""
    _OLMO3.check(hf_config)
    sizes = read_sizes(hf_config, norm_epsilon=1e-5)
    rotary = read_rotary_by_type(
        hf_config,
        head_dim=sizes["head_dim"],
        thetas={"full_attention": 500000.0, "sliding_attention": 500000.0},
    )
    default = [
        "sliding_attention" if (layer + 1) % 4 else "full_attention"
        for layer in range(sizes["num_layers"])
    ]
    window = hf_config.get("sliding_window", 4096)
    types = read_layer_types(hf_config, default, window=window, rotary=rotary)
    bias = given(hf_config, "attention_bias", False)
    return OlmoConfig(layer_types=types, attention_bias=bias, **sizes)


def _family(
    model_type: str, architecture: str, read_config: Callable[[Mapping[str, Any]], OlmoConfig]
) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        read_config=read_config,
        decoder=Olmo,
        naming=Naming(prefix="model", blocks="layers"),
    )


OLMO2 = _family("olmo2", "Olmo2ForCausalLM", read_olmo2)
OLMO3 = _family("olmo3", "Olmo3ForCausalLM", read_olmo3)
