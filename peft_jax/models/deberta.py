"""Encoder of DeBERTa v2 and v3 with a classification or regression head.

Attention is disentangled: besides content with content, it scores a query's content with the
distance of the key ("c2p"), and a key's content with the distance of the query ("p2c"). Far
distances share embeddings, in buckets whose width grows with the distance.

Axes: B batch, T tokens (S those of keys), D embed, K heads, H head dimension, F feed-forward, R
rows of the embedding of distances, C labels.

Source: He et al., 2021, arXiv 2006.03654; He et al., 2023, arXiv 2111.09543.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from peft_jax.core import take_rows
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_count, check_positive_int
from peft_jax.models.attention_layout import MASKED
from peft_jax.models.bert import (
    BertConfig,
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertPooler,
    Hidden,
)
from peft_jax.models.blocks import run_blocks, stack_blocks
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layers import Embedding, LayerNorm, Linear

Distances = Float[Array, "1 rows embed"]
Mask = Bool[Array, "batch 1 tokens keys"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(BertConfig):
    """Architecture of a DeBERTa: BERT's, without absolute positions.

    Attributes:
      max_distance: Distances from this one on share an embedding.
      num_buckets: Number of buckets of distances on each side; 0 for one embedding per distance.
      content_to_position: Whether queries are scored with distances ("c2p").
      position_to_content: Whether keys are scored with distances ("p2c").
      share_maps: Whether the maps of queries and keys are also those of distances
        (`share_att_key`).
      norm_distances: Whether the embedding of distances passes a norm (`norm_rel_ebd`).
    """

    max_distance: int
    num_buckets: int = 0
    content_to_position: bool = True
    position_to_content: bool = True
    share_maps: bool = False
    norm_distances: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("max_distance", self.max_distance)
        check_count("num_buckets", self.num_buckets)
        if self.num_buckets and not 4 <= self.num_buckets < 2 * self.max_distance - 2:
            raise ValueError(
                f"num_buckets is {self.num_buckets}, but must be 0, or at least 4 and below 2 x"
                f" max_distance - 2 = {2 * self.max_distance - 2}"
            )

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens per row; without absolute positions, none is too large."""
        return 2**31 - 1

    @property
    def num_distances(self) -> int:
        """Number of rows of the embedding of distances."""
        return 2 * (self.num_buckets or self.max_distance)


def distance_rows(config: DebertaConfig, tokens: int) -> Int[np.ndarray, " distances"]:
    """Returns the row of the embedding for each distance from 1 - T to T - 1.

    Distances of up to half of the buckets have one each. Beyond, the width of a bucket grows with
    the logarithm of the distance, up to `max_distance`.

    Args:
      config: Architecture.
      tokens: T.

    Example:
      >>> config = DebertaConfig(
      ...     vocab_size=9, hidden_size=4, num_layers=1, num_heads=1, intermediate_size=4,
      ...     num_positions=0, max_distance=16, num_buckets=8)
      >>> distance_rows(config, 7).tolist()
      [3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 13]
    """
    distance = np.arange(1 - tokens, tokens)
    half = config.num_distances // 2
    if config.num_buckets:
        middle = config.num_buckets // 2
        # In float32, as in the authors' code: rounding decides about the ends of the buckets.
        far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
        scale = np.log(np.float32((config.max_distance - 1) / middle))
        place = np.ceil(np.log(far) / scale * np.float32(middle - 1)) + middle
        distance = np.where(np.abs(distance) <= middle, distance, place * np.sign(distance))
    return np.clip(distance.astype(np.int64) + half, 0, 2 * half - 1)


class DistanceEmbedding(nnx.Module):
    """The embedding of distances, which all blocks share."""

    def __init__(self, config: DebertaConfig):
        self.config = config
        self.rel_embeddings = Embedding(
            config.num_distances, config.hidden_size, stddev=config.initializer_range
        )
        if config.norm_distances:
            self.LayerNorm = LayerNorm(config.hidden_size, epsilon=config.norm_epsilon)

    def __call__(self, first: int, end: int, dtype: jnp.dtype) -> Distances:
        """Returns the embeddings of rows [first, end), [1, R, D] in `dtype`."""
        table = self.rel_embeddings.embedding.get_value()
        rows = take_rows(table, jnp.arange(first, end))[None].astype(dtype)
        return self.LayerNorm(rows) if self.config.norm_distances else rows


class DisentangledSelfAttention(nnx.Module):
    """Bidirectional multi-head attention to contents and distances, without its output map."""

    def __init__(self, config: DebertaConfig):
        self.config = config

        def project(axis: str) -> Linear:
            embed, stddev = config.hidden_size, config.initializer_range
            return Linear(embed, embed, axes=("embed", axis), bias=True, stddev=stddev)

        self.query_proj = project("heads")
        self.key_proj = project("kv_heads")
        self.value_proj = project("kv_heads")
        if not config.share_maps:
            if config.content_to_position:
                self.pos_key_proj = project("kv_heads")
            if config.position_to_content:
                self.pos_query_proj = project("heads")

    def __call__(
        self, x: Hidden, distances: Distances, rows: Int[np.ndarray, " distances"], mask: Mask
    ) -> Hidden:
        """Returns the outputs of all heads, concatenated to [B, T, D].

        Args:
          x: [B, T, D].
          distances: Embeddings of distances, [1, R, D].
          rows: Row of `distances` for each distance from 1 - T to T - 1.
          mask: Whether a query attends to a key, [B, 1, T, S].
        """
        config = self.config
        maps = Linear.each(x, self.query_proj, self.key_proj, self.value_proj)
        query, key, value = (self._heads(y) for y in maps)
        terms = 1 + config.content_to_position + config.position_to_content
        query = query * (config.head_dim * terms) ** -0.5
        scores = _products("btkh,bskh->bkts", query, key)
        if config.content_to_position:
            to_key = self.key_proj if config.share_maps else self.pos_key_proj
            far = self._heads(to_key(distances))[0]
            # Column c of a row is for the key at distance t - s = T - 1 - c.
            scores += _skew(_products("btkh,ckh->bktc", query, far[rows[::-1]]))
        if config.position_to_content:
            to_query = self.query_proj if config.share_maps else self.pos_query_proj
            far = self._heads(to_query(distances))[0] * (config.head_dim * terms) ** -0.5
            by_key = _skew(_products("bskh,ckh->bksc", key, far[rows]))
            scores += jnp.swapaxes(by_key, 2, 3)
        weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(x.dtype)
        return jnp.einsum("bkts,bskh->btkh", weights, value).reshape(x.shape)

    def _heads(
        self, y: Float[Array, "rows tokens features"]
    ) -> Float[Array, "rows tokens heads head_dim"]:
        return y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim)


def _products(axes: str, left: Array, right: Array) -> Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _skew(
    by_distance: Float[Array, "batch heads tokens distances"],
) -> Float[Array, "batch heads tokens tokens"]:
    """Returns out[i, j] = by_distance[i, j - i + T - 1], by a shift of the rows.

    Its gradient is a shift too, where that of an indexed array would add up single elements.
    """
    *leading, tokens, width = by_distance.shape
    padded = jnp.pad(by_distance, ((0, 0), (0, 0), (0, 0), (0, 1)))
    flat = padded.reshape(*leading, tokens * (width + 1))
    shifted = flat[..., tokens - 1 : tokens - 1 + tokens * width]
    return shifted.reshape(*leading, tokens, width)[..., :tokens]


class DebertaAttention(nnx.Module):
    """The attention sub-layer, with its residual connection and norm."""

    def __init__(self, config: DebertaConfig):
        self.self = DisentangledSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size, ("heads", "embed"))

    @part("attention")
    def __call__(
        self, x: Hidden, distances: Distances, rows: Int[np.ndarray, " distances"], mask: Mask
    ) -> Hidden:
        """Returns the sub-layer's output, [B, T, D]."""
        return self.output(self.self(x, distances, rows, mask), x)


class DebertaBlock(nnx.Module):
    """One transformer block: attention, then the feed-forward layer, a norm after each."""

    def __init__(self, config: DebertaConfig):
        self.attention = DebertaAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size, ("mlp", "embed"))

    def __call__(
        self, x: Hidden, distances: Distances, rows: Int[np.ndarray, " distances"], mask: Mask
    ) -> Hidden:
        """Returns the block's output, [B, T, D]."""
        return self._mlp(self.attention(x, distances, rows, mask))

    @part("mlp")
    def _mlp(self, attended: Hidden) -> Hidden:
        return self.output(self.intermediate(attended), attended)


class Deberta(nnx.Module):
    """The encoder: embeddings, blocks, pooler, head.

    Args:
      config: Architecture.
      execution: Execution settings.

    Raises:
      ValueError: `execution.attention` asks for an implementation without scores of distances.
    """

    def __init__(self, config: DebertaConfig, execution: ExecutionSettings):
        if execution.attention not in ("auto", "dense"):
            raise ValueError(
                f"execution.attention is {execution.attention!r}, but DeBERTa's attention is"
                " implemented as 'dense' (or 'auto') only: it scores distances too"
            )
        self.config, self.execution = config, execution
        self.embeddings = BertEmbeddings(config)
        self.encoder = DistanceEmbedding(config)
        self.layers = stack_blocks(lambda: DebertaBlock(config), config.num_layers)
        self.pooler = BertPooler(config)
        self.classifier = Linear(
            config.hidden_size,
            config.num_labels,
            axes=("embed", "norm"),
            bias=True,
            stddev=config.initializer_range,
        )

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        token_types: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"],
    ) -> Hidden:
        """Returns the hidden states after the last block, [B, T, D]."""
        dtype = self.execution.dtype
        rows = distance_rows(self.config, tokens.shape[1])
        first, end = int(rows[0]), int(rows[-1]) + 1
        distances = self.encoder(first, end, dtype)
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        hidden, _ = run_blocks(
            self.layers,
            [lambda block, x, cache: (block(x, distances, rows - first, mask), cache)]
            * self.config.num_layers,
            self.embeddings(tokens, token_types, positions, dtype),
            cache=None,
            execution=self.execution,
        )
        return hidden

    def classify(
        self, hidden: Hidden, segment_ids: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch labels"]:
        """Returns the head's output [B, C] from the hidden states of each row's first token."""
        del segment_ids
        return self.classifier(self.pooler(hidden[:, 0]))
