"""Attributes of `config.json` and names of tensors that all families of encoders share."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.attributes import given

IRRELEVANT = frozenset(
    {
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "hidden_dropout_prob",
        "output_past",
        "tie_word_embeddings",
    }
)
"""Attributes that do not change the logits.

Dropout of the base is not applied here, because an adapter has its own. Tied embeddings concern the
language-modeling head, which a classifier does not have.
"""

OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
"""Suffixes of tensors in old checkpoints, and their present names."""


def position_ids(prefix: str) -> str:
    """Returns a regular expression for the stored numbers of positions, which are not weights."""
    return rf"({prefix}\.)?embeddings\.position_ids"


def count_labels(hf_config: Mapping[str, Any]) -> int:
    """Returns the number of outputs of the head; transformers' default is 2.

    Example:
      >>> count_labels({"id2label": {"0": "no", "1": "maybe", "2": "yes"}}), count_labels({})
      (3, 2)
    """
    return given(hf_config, "num_labels", len(given(hf_config, "id2label", {})) or 2)


def read_labels(hf_config: Mapping[str, Any]) -> int:
    """Returns the number of outputs of the head, if the kind of problem is implemented.

    Raises:
      ValueError: A row may have several labels, or a regression has several outputs.
    """
    labels = count_labels(hf_config)
    problem = given(hf_config, "problem_type", "")
    if problem == "multi_label_classification" or (problem == "regression" and labels > 1):
        raise ValueError(
            f"config.json sets problem_type = {problem!r} with {labels} labels, but only"
            " single-label classification and regression with one output are implemented"
        )
    return labels
