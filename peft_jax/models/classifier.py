"""An encoder with a classification or regression head, as pure functions of its parameters.

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
from peft_jax.models.bert_families import BERT, ROBERTA, count_labels
from peft_jax.models.causal_lm import default_positions
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.family import Family
from peft_jax.models.model import Model
from peft_jax.models.naming import CLASSIFIER

ENCODERS: dict[str, Family] = {family.model_type: family for family in (BERT, ROBERTA)}
"""The families of encoders by the `model_type` of their `config.json`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceClassifier(Model):
    """An encoder that gives a text, or a pair of texts, a label or a number; see `Model`."""

    @property
    def num_labels(self) -> int:
        """C; with 1 the output is a number and no label's logit."""
        return count_labels(self.hf_config)

    @property
    def max_tokens(self) -> int:
        """The most tokens of a row."""
        return self.config.max_tokens  # type: ignore[attr-defined]

    @property
    def head_leaves(self) -> frozenset[Path]:
        """The paths of the head's leaves, which a pretrained encoder comes without.

        The pooler counts with them: checkpoints of masked language models lack it.
        """
        return frozenset(path for path in self.hf_names() if path[0] in (CLASSIFIER, "pooler"))

    @property
    def head_modules(self) -> tuple[str, ...]:
        """The head's modules as `modules_to_save` names them: they are trained themselves."""
        return tuple(
            sorted({".".join(path[:-1]) for path in self.hf_names() if path[0] == CLASSIFIER})
        )

    def hidden_states(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        token_types: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        """The hidden states after the last block.

        Args:
          params: the parameters.
          tokens: [B, T], each row a text with the tokenizer's own beginning and end.
          token_types: [B, T], 1 for the second text of a pair; zero by default.
          segment_ids: [B, T], 0 for padding, else 1; by default there is no padding.

        Returns:
          [B, T, D] in the compute dtype.

        Raises:
          ValueError: the parameters are not this model's, or a row has more tokens than there are
            learned positions.
        """
        if tokens.shape[1] > self.max_tokens:
            raise ValueError(
                f"{tokens.shape[1]} tokens a row, and the model has positions for {self.max_tokens}"
            )
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        positions = default_positions(tokens, segment_ids)
        return self._bound(params)(tokens, token_types, positions, segment_ids)

    def __call__(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        token_types: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float32[Array, "batch labels"]:
        """The logits of each row's labels, or its number, [B, C]; arguments as `hidden_states`."""
        hidden = self.hidden_states(
            params, tokens, token_types=token_types, segment_ids=segment_ids
        )
        return self._bound(params).classify(hidden).astype(jnp.float32)


def is_encoder(hf_config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is an encoder's, for `build_classifier`.

    Raises:
      ValueError: its `model_type` is no text.
    """
    check_kind(hf_config, "model_type")
    return hf_config.get("model_type") in ENCODERS


def build_classifier(
    hf_config: Mapping[str, Any],
    execution: ExecutionSettings | None = None,
    *,
    num_labels: int | None = None,
) -> SequenceClassifier:
    """The encoder a Hugging Face `config.json` describes, with a head.

    Args:
      hf_config: the parsed `config.json`, as transformers 4 or 5 writes it.
      execution: how the model is computed.
      num_labels: how many labels the head is to have, 1 for a regression; by default as many as
        `config.json` says.

    Raises:
      ValueError: a family, or an attribute, that is not understood; it is named.

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
            f"config.json has the model_type {model_type!r}, which is no encoder implemented here"
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
    """The `config.json` of the model with a head of `count` outputs; its labels' names are kept."""
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
