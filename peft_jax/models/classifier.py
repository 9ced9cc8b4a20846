"""Encoders with a classification or regression head, as pure functions of parameters.

B batch, T tokens, D embed, C labels.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from peft_jax.core import Path, Tree, did_you_mean
from peft_jax.models.attributes import check_kind
from peft_jax.models.bert_families import BERT, ELECTRA, ROBERTA, XLM_ROBERTA
from peft_jax.models.causal_lm import default_positions
from peft_jax.models.deberta_family import DEBERTA
from peft_jax.models.distilbert_family import DISTILBERT
from peft_jax.models.encoder_attributes import count_labels
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.family import Family
from peft_jax.models.model import Model
from peft_jax.models.modernbert_family import MODERNBERT

ENCODERS: dict[str, Family] = {
    family.model_type: family
    for family in (BERT, DEBERTA, DISTILBERT, ELECTRA, MODERNBERT, ROBERTA, XLM_ROBERTA)
}
"""Families of encoders by the `model_type` of their `config.json`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceClassifier(Model):
    """An encoder that classifies or scores a text or a pair of texts; see `Model`."""

    @property
    def num_labels(self) -> int:
        """Number of labels C; 1 for regression, whose output is the predicted value."""
        return count_labels(self.hf_config)

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens per row."""
        return self.config.max_tokens  # type: ignore[attr-defined]

    @property
    def head_leaves(self) -> frozenset[Path]:
        """Paths of the leaves that a pretrained encoder lacks: those of the head and the pooler."""
        heads = (*self.family.naming.heads, "pooler")
        return frozenset(path for path in self.hf_names() if path[0] in heads)

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the head's modules for `modules_to_save`, since the whole head is trainable."""
        heads = self.family.naming.heads
        return tuple(sorted({".".join(path[:-1]) for path in self.hf_names() if path[0] in heads}))

    def hidden_states(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        token_types: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        """Returns the hidden states after the last block.

        Args:
          params: Parameters.
          tokens: [B, T]; each row is a text with the tokenizer's special tokens.
          token_types: [B, T], 1 for the second text of a pair; zero by default.
          segment_ids: [B, T], 0 for padding, else 1; by default there is no padding.

        Returns:
          [B, T, D] in the compute dtype.

        Raises:
          ValueError: The parameters do not fit the model, or T exceeds `max_tokens`.
        """
        if tokens.shape[1] > self.max_tokens:
            raise ValueError(
                f"there are {tokens.shape[1]} tokens per row, but the model has positions for"
                f" {self.max_tokens}"
            )
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        positions = default_positions(tokens, segment_ids)
        return self._bind(params)(tokens, token_types, positions, segment_ids)

    def __call__(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        token_types: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float32[Array, "batch labels"]:
        """Returns each row's logits or predicted value, float32 [B, C]; see `hidden_states`."""
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        hidden = self.hidden_states(
            params, tokens, token_types=token_types, segment_ids=segment_ids
        )
        return self._bind(params).classify(hidden, segment_ids).astype(jnp.float32)


def is_encoder(hf_config: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` describes an encoder, for `build_classifier`.

    Raises:
      ValueError: Its `model_type` is not a string.
    """
    check_kind(hf_config, "model_type")
    return hf_config.get("model_type") in ENCODERS


def build_classifier(
    hf_config: Mapping[str, Any],
    execution: ExecutionSettings | None = None,
    *,
    num_labels: int | None = None,
) -> SequenceClassifier:
    """Builds the encoder that a Hugging Face `config.json` describes, with a head.

    Args:
      hf_config: The parsed `config.json`, as transformers 4 or 5 writes it.
      execution: Execution settings; None for the defaults.
      num_labels: Number of labels of the head, 1 for regression; None for the number in
        `config.json`.

    Raises:
      ValueError: The family or an attribute is unknown; the message names it.

    Example:
      >>> model = build_classifier({
      ...     "model_type": "bert", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2,
      ...     "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16},
      ...     num_labels=3)
      >>> model.abstract_params()["classifier"]["kernel"].shape
      (8, 3)
    """
    model_type = hf_config.get("model_type")
    if not is_encoder(hf_config):
        raise ValueError(
            f"config.json sets model_type = {model_type!r}, which is not an implemented encoder"
            f"{did_you_mean(str(model_type), ENCODERS)}"
        )
    family = ENCODERS[str(model_type)]
    family.read_config(hf_config)
    if num_labels is not None:
        hf_config = _with_labels(hf_config, num_labels, family)
    return SequenceClassifier(
        family=family,
        config=family.read_config(hf_config),
        execution=execution or ExecutionSettings(),
        hf_json=json.dumps(dict(hf_config)),
    )


def _with_labels(hf_config: Mapping[str, Any], count: int, family: Family) -> dict[str, Any]:
    """Returns the `config.json` for a head of `count` outputs, keeping label names that fit."""
    kept = {
        name: value
        for name, value in hf_config.items()
        if name not in ("num_labels", "problem_type", "architectures")
    }
    if count_labels(hf_config) != count or "id2label" not in hf_config:
        kept["id2label"] = {str(index): f"LABEL_{index}" for index in range(count)}
        kept["label2id"] = {f"LABEL_{index}": index for index in range(count)}
    return {
        "architectures": [family.architecture],
        **kept,
        "problem_type": "regression" if count == 1 else "single_label_classification",
    }
