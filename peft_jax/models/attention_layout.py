"""Attention layouts: which keys each query attends to, and ALiBi's penalty on distance.

B batch, T query tokens, S key tokens, K key-value heads, G query heads per key-value head, H head
dimension of queries and keys, V head dimension of values (usually H).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int

from peft_jax.models.cache import KVCache

Queries = Float[Array, "batch tokens kv_heads group head_dim"]
Keys = Float[Array, "batch keys kv_heads head_dim"]
Values = Float[Array, "batch keys kv_heads value_dim"]
Outputs = Float[Array, "batch tokens kv_heads group value_dim"]
Sinks = Float32[Array, "kv_heads group"]
Attend = Callable[..., Outputs]
"""Maps queries, keys, values and, if the layout has them, sinks to outputs."""

_MOST_CHUNKS = 2**15
"""Number of chunks of a segment that are told apart; a segment's later ones repeat the numbers."""

MASKED = -1e30
"""Score of a masked key; finite, so that a fully masked row is not NaN."""


@struct.dataclass
class AttentionLayout:
    """Describes which keys each query attends to.

    A query attends within its own segment. A causal query attends to no later token, and to none
    before its sliding window. Without causal order, the window reaches as far on both sides.

    A pytree. Its fields are typed `Any` because JAX also puts placeholders in place of arrays.

    Attributes:
      query_start: Index of the first query among the keys, a scalar; 0 without a cache.
      query_segments: [B, T], or None if every row is one segment.
      key_segments: [B, S], or None.
      query_positions: [B, T]; with ALiBi only.
      key_positions: [B, S]; with ALiBi only.
      slopes: [K, G], ALiBi's penalty per token of distance (Press et al., 2022, arXiv
        2108.12409), or None.
      window: Number of tokens a query attends to on each side, itself included; None for all.
        Static.
      score_cap: Soft cap of the scores; None for none. Static.
      sinks: Whether each head has a sink, a score that belongs to no key. Static.
      is_causal: Whether later tokens are masked. If False, segments are required, because they
        mask the padding. Static.
      packed: Whether a row may hold several segments. False promises one segment per row, padded
        at its end only, so that a causal kernel needs no mask. Static.
      cached: Whether the keys come from a cache. Static.
      virtual: Number of keys of virtual tokens before those of the tokens, which every query
        attends to, whatever its segment. Static.
    """

    query_start: Any
    query_segments: Any = None
    key_segments: Any = None
    query_positions: Any = None
    key_positions: Any = None
    slopes: Any = None
    window: int | None = struct.field(pytree_node=False, default=None)
    score_cap: float | None = struct.field(pytree_node=False, default=None)
    sinks: bool = struct.field(pytree_node=False, default=False)
    is_causal: bool = struct.field(pytree_node=False, default=True)
    packed: bool = struct.field(pytree_node=False, default=True)
    cached: bool = struct.field(pytree_node=False, default=False)
    virtual: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def bidirectional(
        cls, segment_ids: Int[Array, "batch tokens"], *, window: int | None = None
    ) -> "AttentionLayout":
        """Returns an encoder's layout: every token attends to its whole segment.

        Args:
          segment_ids: [B, T], 0 for padding.
          window: Number of tokens that a token attends to on each side, itself included; None for
            all.
        """
        return cls(
            query_start=jnp.zeros((), jnp.int32),
            query_segments=segment_ids,
            key_segments=segment_ids,
            window=window,
            is_causal=False,
        )

    @classmethod
    def causal(
        cls,
        segment_ids: Int[Array, "batch tokens"] | None,
        cache: KVCache | None,
        *,
        window: int | None = None,
        packed: bool = True,
        score_cap: float | None = None,
        sinks: bool = False,
        virtual: int = 0,
        chunk: int | None = None,
        positions: Int[Array, "batch tokens"] | None = None,
    ) -> "AttentionLayout":
        """Returns a decoder's layout.

        Args:
          segment_ids: [B, T], 0 for padding; None if every row is one segment.
          cache: Cache that already holds these tokens' positions and segments, or None.
          window: Number of tokens a query attends to, itself included; None for all.
          packed: Whether a row may hold several segments.
          score_cap: Soft cap of the scores; None for none.
          sinks: Whether each head has a sink.
          virtual: Number of virtual tokens before the tokens; 0 with a cache, which holds them.
          chunk: Number of positions of a chunk, beyond which no token attends; None for all.
          positions: [B, T]; with chunks only.

        Raises:
          ValueError: A cache is given without `segment_ids`.
        """
        if chunk is not None and positions is not None:
            # A chunk is a segment of its own, and no two of its tokens are farther apart.
            whole = jnp.ones_like(positions) if segment_ids is None else segment_ids
            segment_ids = _in_chunks(whole, positions, chunk)
            packed, window = True, min(chunk, window or chunk)
        if cache is None:
            start, key_segments = jnp.full((), virtual, jnp.int32), segment_ids
            if virtual and segment_ids is not None:
                key_segments = jnp.pad(segment_ids, ((0, 0), (virtual, 0)), constant_values=1)
        else:
            if segment_ids is None:
                raise ValueError("segment_ids is None, but must be given with a cache")
            start, key_segments = cache.length - segment_ids.shape[1], cache.segment_ids
            if chunk is not None:
                key_segments = _in_chunks(key_segments, cache.positions, chunk)
        return cls(
            query_start=start,
            query_segments=segment_ids,
            key_segments=key_segments,
            window=window,
            score_cap=score_cap,
            sinks=sinks,
            packed=packed,
            cached=cache is not None,
            virtual=virtual if cache is None else cache.virtual,
        )

    def with_alibi(
        self,
        slopes: Float32[Array, "kv_heads group"],
        positions: Int[Array, "batch tokens"],
        cache: KVCache | None,
    ) -> "AttentionLayout":
        """Returns the layout with ALiBi's penalty, for queries at `positions`."""
        key_positions = positions if cache is None else cache.positions
        if cache is None and self.virtual:
            first = jnp.arange(self.virtual, dtype=positions.dtype)
            first = jnp.broadcast_to(first, (positions.shape[0], self.virtual))
            key_positions = jnp.concatenate([first, positions], axis=1)
        return dataclasses.replace(
            self, slopes=slopes, query_positions=positions, key_positions=key_positions
        )


def _in_chunks(
    segment_ids: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"], chunk: int
) -> Int[Array, "batch tokens"]:
    """Returns segments that end with their chunk too; 0 stays padding."""
    numbers = positions // chunk % _MOST_CHUNKS
    return jnp.where(segment_ids > 0, segment_ids * _MOST_CHUNKS + numbers, 0)


def alibi_slopes(heads: int) -> Float32[np.ndarray, " heads"]:
    """Returns ALiBi's slope of each head.

    For n heads, n a power of two, the slopes are powers of 2^(-8/n). For other counts, the first
    heads take the slopes of the power of two below; the rest take every other slope of the power
    of two above, as in the authors' code.

    Example:
      >>> alibi_slopes(4)
      array([0.25      , 0.0625    , 0.015625  , 0.00390625], dtype=float32)
    """
    below = 2 ** int(np.log2(heads))
    slopes = 2.0 ** (-8.0 / below * np.arange(1, below + 1))
    rest = 2.0 ** (-4.0 / below * np.arange(1, 2 * (heads - below), 2))
    return np.concatenate([slopes, rest]).astype(np.float32)


def visible(
    layout: AttentionLayout,
    query_index: Int[Array, " tokens"],
    key_index: Int[Array, " keys"],
    query_segments: Int[Array, "batch tokens"] | None,
    key_segments: Int[Array, "batch keys"] | None,
) -> Bool[Array, "rows tokens keys"]:
    """Returns the mask of the keys that each query attends to, [B or 1, T, S]."""
    distance = query_index[:, None] - key_index[None, :]
    seen = distance >= 0 if layout.is_causal else jnp.ones_like(distance, bool)
    if layout.window is not None:
        seen &= (distance if layout.is_causal else jnp.abs(distance)) < layout.window
    seen = seen[None]
    if query_segments is not None and key_segments is not None:
        same = query_segments[:, :, None] == key_segments[:, None, :]
        if layout.virtual:
            same |= (key_index < layout.virtual)[None, None, :]
        seen = seen & same
    return seen


def alibi(
    layout: AttentionLayout,
    query_positions: Int[Array, "batch tokens"] | None,
    key_positions: Int[Array, "batch keys"] | None,
) -> Float32[Array, "batch kv_heads tokens group keys"] | None:
    """Returns ALiBi's bias, minus slope times distance in positions; None without ALiBi."""
    if layout.slopes is None or query_positions is None or key_positions is None:
        return None
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    distance = distance.astype(jnp.float32)[:, None, :, None, :]
    return -layout.slopes[None, :, None, :, None] * distance
