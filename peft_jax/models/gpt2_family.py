"""Reads the `config.json` of GPT-2."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.family import Family
from peft_jax.models.gpt2 import GPT2, GPT2Config
from peft_jax.models.layer_types import LayerType
from peft_jax.models.naming import Naming
from peft_jax.models.nonlinearities import read_activation

_GPT2 = AttributeTable(
    family="gpt2",
    architectures=frozenset({"GPT2LMHeadModel", "GPT2Model"}),
    read=frozenset(
        {
            "activation_function",
            "initializer_range",
            "layer_norm_epsilon",
            "n_embd",
            "n_head",
            "n_inner",
            "n_layer",
            "n_positions",
            "scale_attn_weights",
            "tie_word_embeddings",
            "vocab_size",
        }
    ),
    # Dropout is for training without adapters only; summaries are those of another head.
    irrelevant=frozenset({"attn_pdrop", "embd_pdrop", "n_ctx", "resid_pdrop"})
    | {"reorder_and_upcast_attn", "summary_activation", "summary_first_dropout"}
    | {"summary_proj_to_labels", "summary_type", "summary_use_proj"},
    fixed={"scale_attn_by_inverse_layer_idx": (False,)},
)


def read_gpt2(hf_config: Mapping[str, Any]) -> GPT2Config:
    """Reads the configuration of GPT-2.

    Raises:
      ValueError: An attribute is missing or unknown, or heads do not divide D.
    """
    _GPT2.check(hf_config)
    hidden_size, heads = require(hf_config, "n_embd"), require(hf_config, "n_head")
    if hidden_size % heads:
        raise ValueError(
            f"config.json sets n_embd = {hidden_size}, but it must be a multiple of n_head ="
            f" {heads}"
        )
    return GPT2Config(
        vocab_size=require(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=given(hf_config, "n_inner", 4 * hidden_size),
        num_layers=require(hf_config, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden_size // heads,
        norm_epsilon=given(hf_config, "layer_norm_epsilon", 1e-5),
        max_positions=given(hf_config, "n_positions", 1024),
        layer_types=(LayerType(),),
        tie_word_embeddings=given(hf_config, "tie_word_embeddings", True),
        score_scale=None if given(hf_config, "scale_attn_weights", True) else 1.0,
        initializer_range=given(hf_config, "initializer_range", 0.02),
        activation=read_activation(hf_config, "activation_function", "gelu_new"),
    )


GPT2_FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read_config=read_gpt2,
    decoder=GPT2,
    naming=Naming(prefix="transformer", blocks="h", conv1d=True),
    # Masks that earlier versions of transformers saved.
    unused=(r".*\.attn\.(bias|masked_bias)",),
)
