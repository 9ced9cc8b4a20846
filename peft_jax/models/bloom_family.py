"""Reads the `config.json` of BLOOM."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.bloom import Bloom, BloomConfig
from peft_jax.models.family import Family
from peft_jax.models.naming import Naming

_BLOOM = AttributeTable(
    family="bloom",
    architectures=frozenset({"BloomForCausalLM", "BloomModel"}),
    read=frozenset(
        {
            "apply_residual_connection_post_layernorm",
            "hidden_size",
            "initializer_range",
            "layer_norm_epsilon",
            "n_embed",
            "n_head",
            "n_inner",
            "n_layer",
            "num_attention_heads",
            "num_hidden_layers",
            "tie_word_embeddings",
            "vocab_size",
        }
    ),
    # Execution settings of Megatron-DeepSpeed; transformers ignores them too.
    irrelevant=frozenset(
        {
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "offset_alibi",
            "skip_bias_add",
            "skip_bias_add_qkv",
            "slow_but_exact",
        }
    ),
    fixed={"hidden_dropout": (0.0,)},
)


def read_bloom(hf_config: Mapping[str, Any]) -> BloomConfig:
    """Reads the configuration of BLOOM or BLOOMZ, as BigScience or transformers writes it.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _BLOOM.check(hf_config)
    hidden_size = _either(hf_config, "n_embed", "hidden_size")
    inner = given(hf_config, "n_inner", 4 * hidden_size)
    if inner != 4 * hidden_size:
        raise ValueError(
            f"config.json sets n_inner = {inner}, but for BLOOM it must be 4 * hidden_size ="
            f" {4 * hidden_size}"
        )
    return BloomConfig(
        vocab_size=require(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=_either(hf_config, "n_layer", "num_hidden_layers"),
        num_heads=_either(hf_config, "n_head", "num_attention_heads"),
        norm_epsilon=given(hf_config, "layer_norm_epsilon", 1e-5),
        residual_after_norm=given(hf_config, "apply_residual_connection_post_layernorm", False),
        tie_word_embeddings=given(hf_config, "tie_word_embeddings", True),
        initializer_range=given(hf_config, "initializer_range", 0.02),
    )


def _either(hf_config: Mapping[str, Any], name: str, other: str) -> Any:
    """Returns the value of an attribute that has two names."""
    return given(hf_config, name, None) or require(hf_config, other)


BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    read_config=read_bloom,
    decoder=Bloom,
    naming=Naming(prefix="transformer", blocks="h"),
)
