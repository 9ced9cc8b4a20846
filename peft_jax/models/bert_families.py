"""Reads the `config.json` of BERT and of the families built like it."""

from collections.abc import Mapping
from typing import Any

from peft_jax.core.validation import check_positive_int
from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.bert import Bert, BertConfig
from peft_jax.models.encoder_attributes import (
    IRRELEVANT,
    OLD_NAMES,
    position_ids,
    read_labels,
)
from peft_jax.models.family import Family
from peft_jax.models.naming import Naming
from peft_jax.models.nonlinearities import read_activation

_READ = frozenset(
    {
        "hidden_act",
        "hidden_size",
        "id2label",
        "initializer_range",
        "intermediate_size",
        "layer_norm_eps",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_labels",
        "pad_token_id",
        "problem_type",
        "type_vocab_size",
        "vocab_size",
    }
)
# ELECTRA's head for multiple choice.
_SUMMARY = frozenset(
    {"summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj"}
)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}


def _table(
    family: str,
    *classes: str,
    read: frozenset[str] = frozenset(),
    irrelevant: frozenset[str] = frozenset(),
) -> AttributeTable:
    return AttributeTable(
        family=family,
        architectures=frozenset(classes),
        read=_READ | read,
        irrelevant=IRRELEVANT | irrelevant,
        fixed=_FIXED,
    )


_BERT = _table(
    "bert",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertModel",
)
_ROBERTA = _table(
    "roberta",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaModel",
)
_XLM_ROBERTA = _table(
    "xlm-roberta",
    "XLMRobertaForMaskedLM",
    "XLMRobertaForSequenceClassification",
    "XLMRobertaModel",
)
_ELECTRA = _table(
    "electra",
    "ElectraForMaskedLM",
    "ElectraForPreTraining",
    "ElectraForSequenceClassification",
    "ElectraModel",
    read=frozenset({"embedding_size"}),
    irrelevant=_SUMMARY,
)


def read_bert(hf_config: Mapping[str, Any]) -> BertConfig:
    """Reads the configuration of BERT or a model of its architecture (MiniLM, BGE, E5).

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _BERT.check(hf_config)
    return _read(hf_config, head="pooled")


def read_roberta(hf_config: Mapping[str, Any]) -> BertConfig:
    """Reads the configuration of RoBERTa, whose positions start after its padding id.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _ROBERTA.check(hf_config)
    return _read(hf_config, head="two_layers", position_offset=_first_position(hf_config))


def read_xlm_roberta(hf_config: Mapping[str, Any]) -> BertConfig:
    """Reads the configuration of XLM-RoBERTa, RoBERTa's with a vocabulary of 100 languages.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _XLM_ROBERTA.check(hf_config)
    return _read(hf_config, head="two_layers", position_offset=_first_position(hf_config))


def read_electra(hf_config: Mapping[str, Any]) -> BertConfig:
    """Reads the configuration of ELECTRA, whose embeddings may have fewer features than its blocks.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _ELECTRA.check(hf_config)
    return _read(
        hf_config,
        head="two_layers",
        head_activation="gelu",
        embedding_size=given(hf_config, "embedding_size", 128),
    )


def _first_position(hf_config: Mapping[str, Any]) -> int:
    return given(hf_config, "pad_token_id", 1) + 1


def _read(hf_config: Mapping[str, Any], **others: Any) -> BertConfig:
    types = given(hf_config, "type_vocab_size", 2)
    check_positive_int("type_vocab_size", types)
    return BertConfig(
        vocab_size=require(hf_config, "vocab_size"),
        hidden_size=require(hf_config, "hidden_size"),
        num_layers=require(hf_config, "num_hidden_layers"),
        num_heads=require(hf_config, "num_attention_heads"),
        intermediate_size=require(hf_config, "intermediate_size"),
        num_positions=require(hf_config, "max_position_embeddings"),
        num_token_types=types,
        num_labels=read_labels(hf_config),
        activation=read_activation(hf_config, "hidden_act"),
        norm_epsilon=given(hf_config, "layer_norm_eps", 1e-12),
        initializer_range=given(hf_config, "initializer_range", 0.02),
        **others,
    )


BERT = Family(
    model_type="bert",
    architecture="BertForSequenceClassification",
    read_config=read_bert,
    decoder=Bert,
    naming=Naming(prefix="bert", blocks="encoder.layer"),
    unused=(r"cls\..*", position_ids("bert")),
    old_names=OLD_NAMES,
)
ROBERTA = Family(
    model_type="roberta",
    architecture="RobertaForSequenceClassification",
    read_config=read_roberta,
    decoder=Bert,
    naming=Naming(prefix="roberta", blocks="encoder.layer"),
    unused=(r"lm_head\..*", r"(roberta\.)?pooler\..*", position_ids("roberta")),
    old_names=OLD_NAMES,
)
XLM_ROBERTA = Family(
    model_type="xlm-roberta",
    architecture="XLMRobertaForSequenceClassification",
    read_config=read_xlm_roberta,
    decoder=Bert,
    naming=ROBERTA.naming,
    unused=ROBERTA.unused,
    old_names=OLD_NAMES,
)
ELECTRA = Family(
    model_type="electra",
    architecture="ElectraForSequenceClassification",
    read_config=read_electra,
    decoder=Bert,
    naming=Naming(prefix="electra", blocks="encoder.layer"),
    unused=(r"(generator|discriminator)_\w+\..*", position_ids("electra")),
    old_names=OLD_NAMES,
)
