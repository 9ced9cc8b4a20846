"""Reads the `config.json` of DeBERTa v2 and v3."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import AttributeTable, given, require
from peft_jax.models.deberta import Deberta, DebertaConfig
from peft_jax.models.encoder_attributes import (
    IRRELEVANT,
    OLD_NAMES,
    position_ids,
    read_labels,
)
from peft_jax.models.family import Family
from peft_jax.models.naming import CLASSIFIER, Naming
from peft_jax.models.nonlinearities import read_activation

_DEBERTA = AttributeTable(
    family="deberta-v2",
    architectures=frozenset(
        {"DebertaV2ForMaskedLM", "DebertaV2ForSequenceClassification", "DebertaV2Model"}
    ),
    read=frozenset(
        {
            "attention_head_size",
            "embedding_size",
            "hidden_act",
            "hidden_size",
            "id2label",
            "initializer_range",
            "intermediate_size",
            "layer_norm_eps",
            "max_position_embeddings",
            "max_relative_positions",
            "norm_rel_ebd",
            "num_attention_heads",
            "num_hidden_layers",
            "num_labels",
            "pooler_hidden_act",
            "pooler_hidden_size",
            "pos_att_type",
            "position_biased_input",
            "position_buckets",
            "problem_type",
            "relative_attention",
            "share_att_key",
            "type_vocab_size",
            "vocab_size",
        }
    ),
    # The head of masked language models is not read.
    irrelevant=IRRELEVANT | {"cls_dropout", "legacy", "pooler_dropout"},
    # A convolution beside the first block, in the v2 models of 0.9 and 1.5 billion parameters.
    fixed={"conv_kernel_size": (0,)},
)

_KINDS_OF_SCORES = ("c2p", "p2c")


def read_deberta(hf_config: Mapping[str, Any]) -> DebertaConfig:
    """Reads the configuration of DeBERTa v3, and of v2 without a convolution.

    Raises:
      ValueError: An attribute is missing or unknown.
    """
    _DEBERTA.check(hf_config)
    _check_switch(hf_config, "relative_attention", absent=False, needed=True)
    _check_switch(hf_config, "position_biased_input", absent=True, needed=False)
    hidden_size = require(hf_config, "hidden_size")
    num_heads = require(hf_config, "num_attention_heads")
    for name, size in (
        ("attention_head_size", hidden_size // num_heads),
        ("embedding_size", hidden_size),
        ("pooler_hidden_size", hidden_size),
    ):
        if given(hf_config, name, size) != size:
            raise ValueError(
                f"config.json sets {name} = {hf_config[name]!r}, but only {size} is implemented"
                f" for hidden_size = {hidden_size} and num_attention_heads = {num_heads}"
            )
    scores = _read_scores(hf_config)
    distances = given(hf_config, "max_relative_positions", -1)
    if distances < 1:
        distances = require(hf_config, "max_position_embeddings")
    return DebertaConfig(
        vocab_size=require(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=require(hf_config, "num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=require(hf_config, "intermediate_size"),
        num_positions=0,
        num_token_types=given(hf_config, "type_vocab_size", 0),
        num_labels=read_labels(hf_config),
        head_activation=read_activation(hf_config, "pooler_hidden_act"),
        activation=read_activation(hf_config, "hidden_act"),
        norm_epsilon=given(hf_config, "layer_norm_eps", 1e-7),
        initializer_range=given(hf_config, "initializer_range", 0.02),
        max_distance=distances,
        num_buckets=max(given(hf_config, "position_buckets", -1), 0),
        content_to_position="c2p" in scores,
        position_to_content="p2c" in scores,
        share_maps=given(hf_config, "share_att_key", False),
        norm_distances="layer_norm" in _words(given(hf_config, "norm_rel_ebd", "none")),
    )


def _check_switch(hf_config: Mapping[str, Any], name: str, *, absent: bool, needed: bool) -> None:
    """Raises ValueError unless a switch, or its default, has the implemented value."""
    value = given(hf_config, name, absent)
    if value is not needed:
        said = "sets" if hf_config.get(name) is not None else "leaves"
        raise ValueError(
            f"config.json {said} {name} = {value!r}; 'deberta-v2' models are implemented for"
            f" {name} = {needed!r} only"
        )


def _read_scores(hf_config: Mapping[str, Any]) -> list[str]:
    """Returns the kinds of scores of distances.

    Raises:
      ValueError: There is none, or one is unknown.
    """
    value = given(hf_config, "pos_att_type", [])
    scores = _words(value) if isinstance(value, str) else value
    if not scores or not set(scores) <= set(_KINDS_OF_SCORES):
        raise ValueError(
            f"config.json sets pos_att_type = {value!r}, but it must name one or both of"
            f" {', '.join(_KINDS_OF_SCORES)}"
        )
    return scores


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.lower().split("|")]


DEBERTA = Family(
    model_type="deberta-v2",
    architecture="DebertaV2ForSequenceClassification",
    read_config=read_deberta,
    decoder=Deberta,
    naming=Naming(prefix="deberta", blocks="encoder.layer", heads=("pooler", CLASSIFIER)),
    unused=(
        r"(cls|lm_predictions|mask_predictions)\..*",
        r"(deberta\.)?embeddings\.position_embeddings\..*",
        position_ids("deberta"),
    ),
    old_names=OLD_NAMES,
)
