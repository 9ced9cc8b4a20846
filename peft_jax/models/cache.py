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
      virtual: Number of virtual tokens, whose keys and values are in the first slots; static.
    """

    keys: Any
    values: Any
    positions: Any
    segment_ids: Any
    length: Any
    next_position: Any
    virtual: int = struct.field(pytree_node=False, default=0)

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

    def begin_with(
        self,
        keys: Float[Array, "layers virtual kv_heads head_dim"],
        values: Float[Array, "layers virtual kv_heads head_dim"],
    ) -> "KVCache":
        """Returns the empty cache with virtual tokens in the first slots of every row."""
        count, rows = keys.shape[1], self.positions.shape[0]
        whole = jnp.full((rows,), count, jnp.int32)
        return dataclasses.replace(
            self,
            keys=self.keys.at[:, :, :count].set(keys[:, None].astype(self.keys.dtype)),
            values=self.values.at[:, :, :count].set(values[:, None].astype(self.values.dtype)),
            positions=self.positions.at[:, :count].set(jnp.arange(count, dtype=jnp.int32)),
            segment_ids=self.segment_ids.at[:, :count].set(1),
            length=jnp.full((), count, jnp.int32),
            next_position=whole,
            virtual=count,
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


@struct.dataclass
class VirtualKeys(LayerCache):
    """One layer's keys and values of virtual tokens, to which those of a row's tokens are appended.

    It serves a block in place of a `LayerCache`, without slots: training has no cache.

    Attributes:
      keys: [n, K, H], the same for all rows; None before the virtual tokens have passed the layer.
      values: [n, K, H], or None.
      layer: None.
      start: None.
    """

    keys: Any = None
    values: Any = None
    layer: Any = None
    start: Any = None

    def append(
        self,
        keys: Float[Array, "batch tokens kv_heads head_dim"],
        values: Float[Array, "batch tokens kv_heads head_dim"],
    ) -> "VirtualKeys":
        """Returns all keys and values [B, n + T, K, H]; without others, those of the only row."""
        if self.keys is None:
            return VirtualKeys(keys=keys[0], values=values[0])
        rows = keys.shape[:1]
        return VirtualKeys(
            keys=_after(jnp.broadcast_to(self.keys, (*rows, *self.keys.shape)), keys),
            values=_after(jnp.broadcast_to(self.values, (*rows, *self.values.shape)), values),
        )

    def read(
        self, dtype: jnp.dtype
    ) -> tuple[
        Float[Array, "batch slots kv_heads head_dim"],
        Float[Array, "batch slots kv_heads head_dim"],
    ]:
        """Returns the keys and values in `dtype`, with an axis of rows."""
        keys, values = (
            array if array.ndim == 4 else array[None] for array in (self.keys, self.values)
        )
        return keys.astype(dtype), values.astype(dtype)


def _after(
    virtual: Float[Array, "batch virtual kv_heads head_dim"],
    own: Float[Array, "batch tokens kv_heads head_dim"],
) -> Float[Array, "batch keys kv_heads head_dim"]:
    return jnp.concatenate([virtual.astype(own.dtype), own], axis=1)
