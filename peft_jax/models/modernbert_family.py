"""Reads the `config.json` of ModernBERT."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.encoder_attributes import IRRELEVANT, read_labels
from peft_jax.models.family import Family
from peft_jax.models.modernbert import GLOBAL, LOCAL, POOLINGS, ModernBert, ModernBertConfig
from peft_jax.models.naming import CLASSIFIER, Naming
from peft_jax.models.nonlinearities import read_activation
from peft_jax.models.rope import RotarySettings
from peft_jax.models.rope_attributes import read_rotary

_MODERNBERT = AttributeTable(
    family="modernbert",
    architectures=frozenset(
        {"ModernBertForMaskedLM", "ModernBertForSequenceClassification", "ModernBertModel"}
    ),
    read=frozenset(
        {
            "attention_bias",
            "classifier_activation",
            "classifier_bias",
            "classifier_pooling",
            "global_attn_every_n_layers",
            "global_rope_theta",
            "hidden_activation",
            "hidden_size",
            "id2label",
            "initializer_range",
            "intermediate_size",
            "layer_types",
            "local_attention",
            "local_rope_theta",
            "max_position_embeddings",
            "mlp_bias",
            "norm_bias",
            "norm_eps",
            "num_attention_heads",
            "num_hidden_layers",
            "num_labels",
            "problem_type",
            "rope_parameters",
            "vocab_size",
        }
    ),
    # Published files have `layer_norm_eps` and `position_embedding_type`, which nothing reads.
    irrelevant=IRRELEVANT
    | {
        "attention_dropout",
        "cls_token_id",
        "decoder_bias",
        "deterministic_flash_attn",
        "embedding_dropout",
        "initializer_cutoff_factor",
        "layer_norm_eps",
        "mlp_dropout",
        "position_embedding_type",
        "reference_compile",
        "repad_logits_with_grad",
        "sparse_pred_ignore_index",
        "sparse_prediction",
    },
)


def read_modernbert(hf_config: Mapping[str, Any]) -> ModernBertConfig:
    """Reads the configuration of ModernBERT or mmBERT.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _MODERNBERT.check(hf_config)
    hidden_size = require(hf_config, "hidden_size")
    num_heads = require(hf_config, "num_attention_heads")
    theta = given(hf_config, "global_rope_theta", 160_000.0)
    # As in transformers 4, a null theta of local layers is that of global ones.
    absent = "local_rope_theta" not in hf_config
    local_theta = 10_000.0 if absent else given(hf_config, "local_rope_theta", theta)
    head_dim = hidden_size // num_heads
    pooling = given(hf_config, "classifier_pooling", "cls")
    if pooling not in POOLINGS:
        raise ValueError(
            f"config.json sets classifier_pooling = {pooling!r}; it must be one of"
            f" {', '.join(POOLINGS)}"
        )
    return ModernBertConfig(
        vocab_size=require(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        intermediate_size=require(hf_config, "intermediate_size"),
        layer_types=_read_layer_types(hf_config),
        window=given(hf_config, "local_attention", 128) // 2 + 1,
        rotary=_read_rotary(hf_config, GLOBAL, theta, head_dim),
        local_rotary=_read_rotary(hf_config, LOCAL, local_theta, head_dim),
        max_positions=given(hf_config, "max_position_embeddings", 8192),
        num_labels=read_labels(hf_config),
        pooling=pooling,
        activation=read_activation(hf_config, "hidden_activation"),
        head_activation=read_activation(hf_config, "classifier_activation"),
        attention_bias=given(hf_config, "attention_bias", False),
        mlp_bias=given(hf_config, "mlp_bias", False),
        norm_bias=given(hf_config, "norm_bias", False),
        head_bias=given(hf_config, "classifier_bias", False),
        norm_epsilon=given(hf_config, "norm_eps", 1e-5),
        initializer_range=given(hf_config, "initializer_range", 0.02),
    )


def _read_layer_types(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the type of each block.

    Raises:
      ValueError: There are not as many as blocks, or one is unknown.
    """
    count = require(hf_config, "num_hidden_layers")
    every = given(hf_config, "global_attn_every_n_layers", 3)
    types = given(
        hf_config, "layer_types", [LOCAL if layer % every else GLOBAL for layer in range(count)]
    )
    if len(types) != count or not set(types) <= {GLOBAL, LOCAL}:
        raise ValueError(
            f"config.json sets layer_types = {types!r}; it must name {GLOBAL} or {LOCAL} for each"
            f" of {count} layers"
        )
    return tuple(types)


def _read_rotary(
    hf_config: Mapping[str, Any], kind: str, theta: float, head_dim: int
) -> RotarySettings:
    """Returns the rotary embedding of the layers of one type.

    Raises:
      ValueError: See `read_rotary`.
    """
    parameters = given(hf_config, "rope_parameters", {})
    if unknown := sorted(set(parameters) - {GLOBAL, LOCAL}):
        raise ValueError(
            f"config.json's rope_parameters set {', '.join(unknown)}, but must have the parts"
            f" {GLOBAL} and {LOCAL}"
        )
    own = {"rope_theta": theta, **(parameters.get(kind) or {})}
    attributes = {"rope_parameters": own}
    if "max_position_embeddings" in hf_config:
        attributes["max_position_embeddings"] = hf_config["max_position_embeddings"]
    return read_rotary(attributes, head_dim=head_dim)


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertForSequenceClassification",
    read_config=read_modernbert,
    decoder=ModernBert,
    naming=Naming(
        prefix="model", blocks="layers", heads=("head", CLASSIFIER), later=("attn_norm",)
    ),
    unused=(r"decoder\..*",),
)
