"""Key-value cache for decoding.

L layers, B batch, S slots (keys), K key-value heads, H and V head dimensions of keys and of values
(usually equal). Fields of pytrees are typed
`Any` because JAX also puts placeholders, shapes and shardings in place of arrays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class KVCache:
    """Keys and values of earlier tokens; a pytree.

    All rows are written at the same slots. Shorter rows are padded with segment 0, and each token's
    position is stored. A sliding window counts slots: with one, pad rows on the left, so that no
    padding lies between a row's tokens.

    Attributes:
      keys: [L, B, S, K, H], after rotary embedding.
      values: [L, B, S, K, V].
      positions: [B, S], position of each token.
      segment_ids: [B, S], 0 where a slot is empty or padding.
      length: Number of slots written, a scalar.
      next_position: [B], position of each row's next token.
    """

    keys: Any
    values: Any
    positions: Any
    segment_ids: Any
    length: Any
    next_position: Any

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        batch: int,
        slots: int,
        dims: tuple[int, int, int],
        dtype: jnp.dtype,
    ) -> "KVCache":
        """Returns an empty cache; `dims` are K, H and V."""
        kv_heads, *head_dims = dims
        keys, values = (
            jnp.zeros((layers, batch, slots, kv_heads, dim), dtype) for dim in head_dims
        )
        return cls(
            keys=keys,
            values=values,
            positions=jnp.zeros((batch, slots), jnp.int32),
            segment_ids=jnp.zeros((batch, slots), jnp.int32),
            length=jnp.zeros((), jnp.int32),
            next_position=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def slots(self) -> int:
        """Number of tokens that a row can hold."""
        return self.keys.shape[2]

    def next_positions(self, segment_ids: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
        """Returns the positions [B, T] of each row's next tokens, not counting padding."""
        counted = jnp.cumsum((segment_ids > 0).astype(jnp.int32), axis=1)
        return self.next_position[:, None] + jnp.maximum(counted - 1, 0)

    def append_tokens(
        self, positions: Int[Array, "batch tokens"], segment_ids: Int[Array, "batch tokens"]
    ) -> "KVCache":
        """Returns the cache with the positions and segments of the next tokens appended.

        Their keys and values are written later, by `LayerCache.append`.
        """
        start = (jnp.zeros((), jnp.int32), self.length)
        seen = jnp.max(jnp.where(segment_ids > 0, positions + 1, 0), axis=1)
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice(self.positions, positions, start),
            segment_ids=jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, start),
            length=self.length + positions.shape[1],
            next_position=jnp.maximum(self.next_position, seen),
        )


@struct.dataclass
class LayerCache:
    """One layer's view of a `KVCache`, passed to its block.

    Attributes:
      keys: [L, B, S, K, H]; of all layers, so that a scan updates it in place.
      values: [L, B, S, K, V].
      layer: Index of the layer, a scalar.
      start: First slot to write, a scalar.
    """

    keys: Any
    values: Any
    layer: Any
    start: Any

    def append(
        self,
        keys: Float[Array, "batch tokens kv_heads head_dim"],
        values: Float[Array, "batch tokens kv_heads value_dim"],
    ) -> "LayerCache":
        """Returns the cache with this layer's next keys and values written."""
        zero = jnp.zeros((), jnp.int32)
        where = (self.layer, zero, self.start, zero, zero)
        keys, values = keys.astype(self.keys.dtype), values.astype(self.values.dtype)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys[None], where),
            values=jax.lax.dynamic_update_slice(self.values, values[None], where),
        )

    def read(
        self, dtype: jnp.dtype
    ) -> tuple[
        Float[Array, "batch slots kv_heads head_dim"],
        Float[Array, "batch slots kv_heads value_dim"],
    ]:
        """Returns this layer's keys and values in `dtype`, all slots."""
        keys, values = (
            jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False)
            for array in (self.keys, self.values)
        )
        return keys.astype(dtype), values.astype(dtype)
