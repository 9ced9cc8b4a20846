"""Reads the `config.json` of DistilBERT."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.bert import BertConfig
from peft_jax.models.distilbert import DistilBert
from peft_jax.models.encoder_attributes import (
    IRRELEVANT,
    OLD_NAMES,
    position_ids,
    read_labels,
)
from peft_jax.models.family import Family
from peft_jax.models.naming import CLASSIFIER, Naming
from peft_jax.models.nonlinearities import read_activation

_DISTILBERT = AttributeTable(
    family="distilbert",
    architectures=frozenset(
        {"DistilBertForMaskedLM", "DistilBertForSequenceClassification", "DistilBertModel"}
    ),
    read=frozenset(
        {
            "activation",
            "dim",
            "hidden_dim",
            "id2label",
            "initializer_range",
            "max_position_embeddings",
            "n_heads",
            "n_layers",
            "num_labels",
            "problem_type",
            "vocab_size",
        }
    ),
    # Sinusoids are stored as a table of positions, like learned ones.
    irrelevant=IRRELEVANT
    | {
        "attention_dropout",
        "dropout",
        "qa_dropout",
        "seq_classif_dropout",
        "sinusoidal_pos_embds",
        "tie_weights_",
    },
)


def read_distilbert(hf_config: Mapping[str, Any]) -> BertConfig:
    """Reads the configuration of DistilBERT, which has no token types.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _DISTILBERT.check(hf_config)
    return BertConfig(
        vocab_size=require(hf_config, "vocab_size"),
        hidden_size=require(hf_config, "dim"),
        num_layers=require(hf_config, "n_layers"),
        num_heads=require(hf_config, "n_heads"),
        intermediate_size=require(hf_config, "hidden_dim"),
        num_positions=require(hf_config, "max_position_embeddings"),
        num_token_types=0,
        num_labels=read_labels(hf_config),
        activation=read_activation(hf_config, "activation"),
        initializer_range=given(hf_config, "initializer_range", 0.02),
    )


DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBertForSequenceClassification",
    read_config=read_distilbert,
    decoder=DistilBert,
    naming=Naming(
        prefix="distilbert", blocks="transformer.layer", heads=("pre_classifier", CLASSIFIER)
    ),
    unused=(r"vocab_\w+\..*", position_ids("distilbert")),
    old_names=OLD_NAMES,
)
