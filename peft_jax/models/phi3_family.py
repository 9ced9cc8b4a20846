"""Reads the `config.json` of Phi-3 and Phi-4."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable
from peft_jax.models.common_attributes import COMMON, SILU, read_sizes
from peft_jax.models.decoder import DecoderConfig
from peft_jax.models.family import Family
from peft_jax.models.layer_types import LayerType
from peft_jax.models.naming import Naming
from peft_jax.models.phi3 import Phi3
from peft_jax.models.rope_attributes import read_rotary

_PHI3 = AttributeTable(
    family="phi3",
    architectures=frozenset({"Phi3ForCausalLM", "Phi3Model"}),
    read=COMMON | {"sliding_window"},
    # Dropout is for training without adapters only.
    irrelevant=frozenset({"attention_dropout", "embd_pdrop", "resid_pdrop"}),
    fixed=SILU
    | {
        "attention_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "lm_head_bias": (False,),
        "mlp_bias": (False,),
    },
)
_LONGROPE = ("su", "yarn")
"""Earlier names of the rope type "longrope" in this family."""


def read_phi3(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the configuration of Phi-3 or Phi-4.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    hf_config = {**hf_config}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(hf_config.get(name), Mapping):
            hf_config[name] = {
                key: "longrope" if key in ("type", "rope_type") and value in _LONGROPE else value
                for key, value in hf_config[name].items()
            }
    _PHI3.check(hf_config)
    sizes = read_sizes(hf_config, norm_epsilon=1e-5)
    rotary = read_rotary(hf_config, head_dim=sizes["head_dim"], default_part=1.0)
    layer = LayerType(window=hf_config.get("sliding_window"), rotary=rotary)
    return DecoderConfig(layer_types=(layer,), **sizes)


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read_config=read_phi3,
    decoder=Phi3,
    naming=Naming(prefix="model", blocks="layers"),
)
