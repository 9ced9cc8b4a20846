"""Reads the `config.json` of GPT-NeoX and Pythia."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given
from peft_jax.models.common_attributes import COMMON, read_sizes
from peft_jax.models.family import Family
from peft_jax.models.gpt_neox import GPTNeoX, GPTNeoXConfig
from peft_jax.models.layer_types import LayerType
from peft_jax.models.naming import Naming
from peft_jax.models.nonlinearities import read_activation
from peft_jax.models.rope_attributes import read_rotary

_GPT_NEOX = AttributeTable(
    family="gpt_neox",
    architectures=frozenset({"GPTNeoXForCausalLM", "GPTNeoXModel"}),
    read=COMMON - {"head_dim", "num_key_value_heads", "rms_norm_eps"}
    | {"attention_bias", "hidden_act", "layer_norm_eps", "rotary_emb_base", "rotary_pct"}
    | {"use_parallel_residual"},
    # Dropout is for training without adapters only.
    irrelevant=frozenset({"attention_dropout", "attention_probs_dropout_prob"})
    | {"classifier_dropout", "hidden_dropout", "hidden_dropout_prob"},
)


def read_gpt_neox(hf_config: Mapping[str, Any]) -> GPTNeoXConfig:
    """Reads the configuration of GPT-NeoX or Pythia.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _GPT_NEOX.check(hf_config)
    sizes = read_sizes(hf_config)
    rotary = read_rotary(
        hf_config,
        head_dim=sizes["head_dim"],
        default_theta=given(hf_config, "rotary_emb_base", 10000.0),
        default_part=given(hf_config, "rotary_pct", 0.25),
    )
    return GPTNeoXConfig(
        layer_types=(LayerType(rotary=rotary),),
        activation=read_activation(hf_config, "hidden_act", "gelu"),
        attention_bias=given(hf_config, "attention_bias", True),
        parallel_residual=given(hf_config, "use_parallel_residual", True),
        **{**sizes, "norm_epsilon": given(hf_config, "layer_norm_eps", 1e-5)},
    )


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read_config=read_gpt_neox,
    decoder=GPTNeoX,
    naming=Naming(prefix="gpt_neox", blocks="layers"),
    # Masks and frequencies that earlier versions of transformers saved.
    unused=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    old_names=(("embed_out.weight", "lm_head.weight"),),
)
