"""Reads the `config.json` of BERT and RoBERTa."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.bert import ACTIVATIONS, Bert, BertConfig
from peft_jax.models.family import Family
from peft_jax.models.naming import Naming

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
# Dropout of the base is not applied here, because an adapter has its own. Tied embeddings concern
# the language-modeling head, which a classifier does not have.
_IRRELEVANT = frozenset(
    {
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "hidden_dropout_prob",
        "tie_word_embeddings",
    }
)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}


def _table(family: str, *classes: str) -> AttributeTable:
    return AttributeTable(
        family=family,
        architectures=frozenset(classes),
        read=_READ,
        irrelevant=_IRRELEVANT,
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


def read_bert(hf_config: Mapping[str, Any]) -> BertConfig:
    """Reads the configuration of BERT or a model of its architecture (MiniLM, BGE, E5).

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _BERT.check(hf_config)
    return _read(hf_config, head="pooled", position_offset=0, norm_epsilon=1e-12)


def read_roberta(hf_config: Mapping[str, Any]) -> BertConfig:
    """Reads the configuration of RoBERTa, whose positions start after its padding id.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _ROBERTA.check(hf_config)
    offset = given(hf_config, "pad_token_id", 1) + 1
    return _read(hf_config, head="two_layers", position_offset=offset, norm_epsilon=1e-12)


def count_labels(hf_config: Mapping[str, Any]) -> int:
    """Returns the number of outputs of the head; transformers' default is 2.

    Example:
      >>> count_labels({"id2label": {"0": "no", "1": "maybe", "2": "yes"}}), count_labels({})
      (3, 2)
    """
    return given(hf_config, "num_labels", len(given(hf_config, "id2label", {})) or 2)


def _read(
    hf_config: Mapping[str, Any], *, head: str, position_offset: int, norm_epsilon: float
) -> BertConfig:
    labels = count_labels(hf_config)
    problem = given(hf_config, "problem_type", "")
    if problem == "multi_label_classification" or (problem == "regression" and labels > 1):
        raise ValueError(
            f"config.json sets problem_type = {problem!r} with {labels} labels, but only"
            " single-label classification and regression with one output are implemented"
        )
    activation = given(hf_config, "hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"config.json sets hidden_act = {activation!r}, which is not implemented; choose from:"
            f" {', '.join(ACTIVATIONS)}"
        )
    return BertConfig(
        vocab_size=require(hf_config, "vocab_size"),
        hidden_size=require(hf_config, "hidden_size"),
        num_layers=require(hf_config, "num_hidden_layers"),
        num_heads=require(hf_config, "num_attention_heads"),
        intermediate_size=require(hf_config, "intermediate_size"),
        num_positions=require(hf_config, "max_position_embeddings"),
        position_offset=position_offset,
        num_token_types=given(hf_config, "type_vocab_size", 2),
        num_labels=labels,
        head=head,
        activation=activation,
        norm_epsilon=given(hf_config, "layer_norm_eps", norm_epsilon),
        initializer_range=given(hf_config, "initializer_range", 0.02),
    )


_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
_POSITION_IDS = r"(bert\.|roberta\.)?embeddings\.position_ids"

BERT = Family(
    model_type="bert",
    architecture="BertForSequenceClassification",
    read_config=read_bert,
    decoder=Bert,
    naming=Naming(prefix="bert", blocks="encoder.layer"),
    unused=(r"cls\..*", _POSITION_IDS),
    old_names=_OLD_NAMES,
)
ROBERTA = Family(
    model_type="roberta",
    architecture="RobertaForSequenceClassification",
    read_config=read_roberta,
    decoder=Bert,
    naming=Naming(prefix="roberta", blocks="encoder.layer"),
    unused=(r"lm_head\..*", r"(roberta\.)?pooler\..*", _POSITION_IDS),
    old_names=_OLD_NAMES,
)
