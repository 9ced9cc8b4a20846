"""Reads the `config.json` of OLMo 2."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given
from peft_jax.models.common_attributes import COMMON, SILU, read_sizes
from peft_jax.models.family import Family
from peft_jax.models.layer_types import LayerType
from peft_jax.models.naming import Naming
from peft_jax.models.olmo import Olmo, OlmoConfig
from peft_jax.models.rope import read_rotary

_OLMO2 = AttributeTable(
    family="olmo2",
    architectures=frozenset({"Olmo2ForCausalLM", "Olmo2Model"}),
    read=COMMON | {"attention_bias"},
    fixed=SILU,
)


def read_olmo2(hf_config: Mapping[str, Any]) -> OlmoConfig:
    """Reads the configuration of OLMo 2."""
    _OLMO2.check(hf_config)
    sizes = read_sizes(hf_config, norm_epsilon=1e-5)
    layer = LayerType(rotary=read_rotary(hf_config, head_dim=sizes["head_dim"]))
    bias = given(hf_config, "attention_bias", False)
    return OlmoConfig(layer_types=(layer,), attention_bias=bias, **sizes)


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=read_olmo2,
    decoder=Olmo,
    naming=Naming(prefix="model", blocks="layers"),
)
