"""Reads the `config.json` of Command R7B and Command A."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given
from peft_jax.models.cohere2 import Cohere2
from peft_jax.models.common_attributes import COMMON, SILU, read_layer_types, read_sizes
from peft_jax.models.family import Family
from peft_jax.models.llama import LlamaConfig
from peft_jax.models.logit_rule import LogitRule
from peft_jax.models.naming import Naming
from peft_jax.models.rope_attributes import read_rotary

_COHERE2 = AttributeTable(
    family="cohere2",
    architectures=frozenset({"Cohere2ForCausalLM", "Cohere2Model"}),
    read=(COMMON - {"rms_norm_eps"})
    | {"attention_bias", "layer_norm_eps", "layer_types", "logit_scale", "sliding_window"}
    | {"sliding_window_pattern"},
    irrelevant=frozenset({"cache_implementation", "layer_switch", "use_parallel_embedding"}),
    # Published files describe the architecture by these too.
    fixed=SILU
    | {
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1.0,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_qk_norm": (False,),
    },
)


def read_cohere2(hf_config: Mapping[str, Any]) -> LlamaConfig:
    """Reads the configuration of Command R7B or A: three layers slide of each four."""
    _COHERE2.check(hf_config)
    epsilon = given(hf_config, "layer_norm_eps", 1e-5)
    sizes = read_sizes({**hf_config, "rms_norm_eps": epsilon}, tied=True)
    every = given(hf_config, "sliding_window_pattern", 4)
    default = [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(sizes["num_layers"])
    ]
    rotary = {
        "sliding_attention": read_rotary(hf_config, head_dim=sizes["head_dim"]),
        "full_attention": None,
    }
    window = hf_config.get("sliding_window", 4096)
    bias = given(hf_config, "attention_bias", False)
    return LlamaConfig(
        layer_types=read_layer_types(hf_config, default, window=window, rotary=rotary),
        logit_rule=LogitRule(divisor=1.0 / given(hf_config, "logit_scale", 0.0625)),
        qkv_bias=bias,
        output_bias=bias,
        **sizes,
    )


COHERE2 = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    read_config=read_cohere2,
    decoder=Cohere2,
    naming=Naming(prefix="model", blocks="layers"),
)
