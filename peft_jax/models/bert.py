"""Encoders of BERT, RoBERTa, XLM-RoBERTa and ELECTRA with a classification or regression head.

Axes: B batch, T tokens, D embed, K heads, H head dimension, F feed-forward, C labels.

Source: Devlin et al., 2019, arXiv 1810.04805; Liu et al., 2019, arXiv 1907.11692; Conneau et al.,
2020, arXiv 1911.02116; Clark et al., 2020, arXiv 2003.10555.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from peft_jax.core.scopes import part
from peft_jax.core.validation import (
    check_choice,
    check_count,
    check_positive,
    check_positive_int,
)
from peft_jax.models.attention import make_attention
from peft_jax.models.attention_layout import Attend, AttentionLayout
from peft_jax.models.blocks import run_blocks, stack_blocks
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layers import Embedding, LayerNorm, Linear, recomputed
from peft_jax.models.nonlinearities import ACTIVATIONS

Hidden = Float[Array, "batch tokens embed"]

HEADS = ("pooled", "two_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Architecture of an encoder with a head.

    Attributes:
      vocab_size: Number of rows of the token embedding.
      hidden_size: D.
      num_layers: Number of transformer blocks.
      num_heads: K; divides D.
      intermediate_size: F.
      num_positions: Number of rows of the position embedding; 0 for none.
      position_offset: Row of a text's first token. RoBERTa's rows start after its padding id.
      num_token_types: Number of rows of the token-type embedding; 0 for none.
      embedding_size: Number of features of the embeddings, which a linear map takes to D if they
        differ (ELECTRA); None for D.
      num_labels: C; 1 for regression.
      head: "pooled" (BERT): the pooler, then one map from the first token. "two_layers"
        (RoBERTa): two maps from the first token, without a pooler.
      head_activation: Nonlinearity after the head's first map, a key of `ACTIVATIONS`.
      activation: Nonlinearity of the feed-forward layer, a key of `ACTIVATIONS`.
      norm_epsilon: Added to the variance in every norm.
      initializer_range: Initial standard deviation of kernels and embeddings.

    Raises:
      ValueError: A size is not positive, heads do not divide D, or a name is unknown.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_positions: int
    position_offset: int = 0
    num_token_types: int = 2
    embedding_size: int | None = None
    num_labels: int = 2
    head: str = "pooled"
    head_activation: str = "tanh"
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        for name in (*sizes, "num_labels"):
            check_positive_int(name, getattr(self, name))
        if self.embedding_size is not None:
            check_positive_int("embedding_size", self.embedding_size)
        for name in ("num_positions", "num_token_types"):
            check_count(name, getattr(self, name))
        check_positive("norm_epsilon", self.norm_epsilon)
        for name in ("activation", "head_activation"):
            check_choice(name, getattr(self, name), ACTIVATIONS)
        check_choice("head", self.head, HEADS)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but must be a multiple of num_heads ="
                f" {self.num_heads}"
            )

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads, K."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads

    @property
    def embedding_features(self) -> int:
        """Number of features of the embeddings, before they are mapped to D."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def tie_word_embeddings(self) -> bool:
        """False: the head is not the transposed embedding."""
        return False

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens per row, limited by the learned positions."""
        return self.num_positions - self.position_offset


def _linear(config: BertConfig, d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
    return Linear(d_in, d_out, axes=axes, bias=True, stddev=config.initializer_range)


def _norm(config: BertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon)


class BertEmbeddings(nnx.Module):
    """The normalized sum of token, position and token-type embeddings."""

    def __init__(self, config: BertConfig):
        def table(rows: int) -> Embedding:
            return Embedding(rows, config.embedding_features, stddev=config.initializer_range)

        self.config = config
        self.word_embeddings = table(config.vocab_size)
        if config.num_positions:
            self.position_embeddings = table(config.num_positions)
        if config.num_token_types:
            self.token_type_embeddings = table(config.num_token_types)
        self.LayerNorm = LayerNorm(config.embedding_features, epsilon=config.norm_epsilon)

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        token_types: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        dtype: jnp.dtype,
    ) -> Hidden:
        """Returns the embedded tokens [B, T, `embedding_features`], in `dtype`."""
        embedded = self.word_embeddings(tokens, dtype)
        if self.config.num_positions:
            embedded += self.position_embeddings(positions + self.config.position_offset, dtype)
        if self.config.num_token_types:
            embedded += self.token_type_embeddings(token_types, dtype)
        return self.LayerNorm(embedded)


class BertSelfAttention(nnx.Module):
    """Bidirectional multi-head attention, without its output map."""

    def __init__(self, config: BertConfig):
        self.config = config
        embed = config.hidden_size
        self.query = _linear(config, embed, embed, ("embed", "heads"))
        self.key = _linear(config, embed, embed, ("embed", "kv_heads"))
        self.value = _linear(config, embed, embed, ("embed", "kv_heads"))

    def __call__(self, x: Hidden, attend: Attend) -> Hidden:
        """Returns the outputs of all heads, concatenated to [B, T, D]."""
        config = self.config
        shape = (*x.shape[:2], config.num_heads, config.head_dim)
        maps = Linear.each(x, self.query, self.key, self.value)
        query, key, value = (y.reshape(shape) for y in maps)
        out = attend(query[:, :, :, None] * config.head_dim**-0.5, key, value)
        return out.reshape(x.shape)


class BertOutput(nnx.Module):
    """The output of a sub-layer: a linear map, the residual connection, then a norm."""

    def __init__(self, config: BertConfig, d_in: int, axes: tuple[str, str]):
        self.dense = _linear(config, d_in, config.hidden_size, axes)
        self.LayerNorm = _norm(config)

    def __call__(self, x: Float[Array, "batch tokens features"], residual: Hidden) -> Hidden:
        """Returns norm(dense(x) + residual), [B, T, D]."""
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nnx.Module):
    """The attention sub-layer, with its residual connection and norm."""

    def __init__(self, config: BertConfig):
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size, ("heads", "embed"))

    @part("attention")
    def __call__(self, x: Hidden, attend: Attend) -> Hidden:
        """Returns the sub-layer's output, [B, T, D]."""
        return self.output(self.self(x, attend), x)


class BertIntermediate(nnx.Module):
    """The first map of the feed-forward layer, with its nonlinearity."""

    def __init__(self, config: BertConfig):
        self.activation = config.activation
        self.dense = _linear(config, config.hidden_size, config.intermediate_size, ("embed", "mlp"))

    def __call__(self, x: Hidden) -> Float[Array, "batch tokens mlp"]:
        """Returns activation(dense(x)), [B, T, F]."""
        (hidden,) = Linear.each(x, self.dense)
        return recomputed(ACTIVATIONS[self.activation])(hidden)


class BertBlock(nnx.Module):
    """One transformer block: attention, then the feed-forward layer, a norm after each."""

    def __init__(self, config: BertConfig):
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size, ("mlp", "embed"))

    def __call__(self, x: Hidden, attend: Attend) -> Hidden:
        """Returns the block's output, [B, T, D]."""
        attended = self.attention(x, attend)
        return self._mlp(attended)

    @part("mlp")
    def _mlp(self, attended: Hidden) -> Hidden:
        return self.output(self.intermediate(attended), attended)


class BertPooler(nnx.Module):
    """BERT's pooler: a linear map and a nonlinearity of the first token's state."""

    def __init__(self, config: BertConfig):
        self.activation = config.head_activation
        # Both axes are the residual stream's, and one mesh axis can shard only one of them.
        self.dense = _linear(config, config.hidden_size, config.hidden_size, ("embed", "norm"))

    def __call__(self, first: Float[Array, "batch embed"]) -> Float[Array, "batch embed"]:
        """Returns the pooled states, [B, D]."""
        return ACTIVATIONS[self.activation](self.dense(first))


class TwoLayerHead(nnx.Module):
    """RoBERTa's head: a linear map and a nonlinearity, then a linear map to the labels."""

    def __init__(self, config: BertConfig):
        self.activation = config.head_activation
        self.dense = _linear(config, config.hidden_size, config.hidden_size, ("embed", "norm"))
        self.out_proj = _linear(config, config.hidden_size, config.num_labels, ("embed", "norm"))

    def __call__(self, first: Float[Array, "batch embed"]) -> Float[Array, "batch labels"]:
        """Returns the logits, [B, C]."""
        return self.out_proj(ACTIVATIONS[self.activation](self.dense(first)))


class Bert(nnx.Module):
    """The encoder: embeddings, blocks, optional pooler, head.

    Args:
      config: Architecture.
      execution: Execution settings.
    """

    def __init__(self, config: BertConfig, execution: ExecutionSettings):
        self.config, self.execution = config, execution
        self.embeddings = BertEmbeddings(config)
        if config.embedding_features != config.hidden_size:
            self.embeddings_project = _linear(
                config, config.embedding_features, config.hidden_size, ("norm", "embed")
            )
        self.layers = stack_blocks(lambda: BertBlock(config), config.num_layers)
        if config.head == "pooled":
            self.pooler = BertPooler(config)
            self.classifier: Any = _linear(
                config, config.hidden_size, config.num_labels, ("embed", "norm")
            )
        else:
            self.classifier = TwoLayerHead(config)

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        token_types: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"],
    ) -> Hidden:
        """Returns the hidden states after the last block, [B, T, D]."""
        count = tokens.shape[1]
        attend = make_attention(
            AttentionLayout.bidirectional(segment_ids),
            tokens=count,
            keys=count,
            head_dim=self.config.head_dim,
            execution=self.execution,
        )
        embedded = self.embeddings(tokens, token_types, positions, self.execution.dtype)
        if self.config.embedding_features != self.config.hidden_size:
            embedded = self.embeddings_project(embedded)
        hidden, _ = run_blocks(
            self.layers,
            [lambda block, x, cache: (block(x, attend), cache)] * self.config.num_layers,
            embedded,
            cache=None,
            execution=self.execution,
        )
        return hidden

    def classify(
        self, hidden: Hidden, segment_ids: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch labels"]:
        """Returns the head's output [B, C] from the hidden states of each row's first token."""
        del segment_ids
        first = hidden[:, 0]
        return self.classifier(self.pooler(first) if self.config.head == "pooled" else first)
