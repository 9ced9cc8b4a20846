"""Runs decoders with virtual tokens before the tokens of every sequence.

Virtual tokens come first and are the same in every sequence, so what they compute does not depend
on the tokens. They are computed once, for all rows, and each layer's tokens attend to their keys
and values. So rows may hold several sequences, and each of them begins with the virtual tokens.

n virtual tokens, L layers, K key-value heads, H head dimension, D embed.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from peft_jax.core import VirtualTokens
from peft_jax.models.blocks import RunBlock
from peft_jax.models.cache import KVCache, LayerCache, VirtualKeys
from peft_jax.models.execution import ExecutionSettings

Hidden = Float[Array, "batch tokens embed"]
Keys = Float[Array, "layers virtual kv_heads head_dim"]


class CausalDecoder(nnx.Module):
    """What decoders share: their inputs are tokens, after virtual tokens if there are some.

    Attributes:
      config: Architecture.
      execution: Execution settings.
    """

    config: Any
    execution: ExecutionSettings

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Hidden:
        """Returns the embeddings of tokens, in the compute dtype."""
        raise NotImplementedError

    def block_input(self, embedded: Hidden, positions: Int[Array, "batch tokens"]) -> Hidden:
        """Returns the first block's input, given embeddings of tokens or virtual tokens."""
        del positions
        return embedded

    def runs(
        self,
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"] | None,
        cache: KVCache | None,
        packed: bool,
        *,
        virtual: int = 0,
        longest: Any = None,
    ) -> Sequence[RunBlock]:
        """Returns the function that runs each layer's block.

        Args:
          positions: [B, T].
          segment_ids: [B, T], or None if every row is one segment.
          cache: Cache that already holds these tokens' positions and segments, or None.
          packed: Whether a row may hold several segments.
          virtual: Number of virtual tokens before the tokens; 0 with a cache, which holds them.
          longest: Number of positions of the longest row, for rotary embeddings that depend on it;
            None for that of `positions`, or for the cache's slots.
        """
        raise NotImplementedError

    def run(
        self, runs: Sequence[RunBlock], hidden: Any, cache: KVCache | None, keys: Any = None
    ) -> tuple[Any, KVCache | None]:
        """Passes the first block's input through all blocks; see `run_blocks`."""
        raise NotImplementedError

    def finish(self, hidden: Hidden) -> Hidden:
        """Returns the final norm of the last block's output."""
        raise NotImplementedError

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"] | None,
        cache: KVCache | None,
        packed: bool,
        virtual: VirtualTokens | None = None,
    ) -> tuple[Hidden, KVCache | None]:
        """Returns the hidden states after the final norm, and the updated cache if one is given.

        Args:
          tokens: [B, T].
          positions: [B, T], which count the virtual tokens.
          segment_ids: [B, T], or None if every row is one segment.
          cache: Keys and values of earlier tokens, or None.
          packed: Whether a row may hold several segments.
          virtual: Virtual tokens; None for none, and with a cache, which holds them.
        """
        hidden = self.block_input(self.embed(tokens), positions)
        count = 0 if virtual is None else virtual.count
        runs = self.runs(positions, segment_ids, cache, packed, virtual=count)
        if virtual is None:
            hidden, cache = self.run(runs, hidden, cache)
        elif virtual.embeddings is None:
            hidden, _ = self.run(runs, hidden, None, VirtualKeys(*self._split_heads(virtual)))
        else:
            first, own = self._virtual_input(virtual), _positions(count)
            of_virtual = self.runs(own, None, None, False, longest=jnp.max(positions) + 1)
            (hidden, _), _ = self.run(_side_by_side(of_virtual, runs), (hidden, first), None)
        return self.finish(hidden), cache

    def virtual_keys(self, virtual: VirtualTokens, *, slots: int) -> tuple[Keys, Keys]:
        """Returns the keys and values of virtual tokens, [L, n, K, H], to begin a cache with.

        Args:
          virtual: Virtual tokens.
          slots: Number of slots of that cache.
        """
        if virtual.embeddings is None:
            return self._split_heads(virtual)
        config, positions = self.config, _positions(virtual.count)
        segment_ids = jnp.ones_like(positions)
        cache = KVCache.empty(
            layers=config.num_layers,
            batch=1,
            slots=virtual.count,
            dims=(config.num_kv_heads, config.head_dim, config.head_dim),
            dtype=self.execution.dtype,
        ).append_tokens(positions, segment_ids)
        runs = self.runs(positions, segment_ids, cache, False, longest=slots)
        _, filled = self.run(runs, self._virtual_input(virtual), cache)
        assert filled is not None
        return filled.keys[:, 0], filled.values[:, 0]

    def _virtual_input(self, virtual: VirtualTokens) -> Hidden:
        """Returns the first block's input [1, n, D] for the virtual tokens."""
        embedded = virtual.embeddings[None].astype(self.execution.dtype)
        return self.block_input(embedded, _positions(virtual.count))

    def _split_heads(self, virtual: VirtualTokens) -> tuple[Keys, Keys]:
        """Gives the heads of keys and values an axis of their own, in the compute dtype."""
        heads = (self.config.num_kv_heads, self.config.head_dim)
        keys, values = (
            array.reshape(*array.shape[:2], *heads).astype(self.execution.dtype)
            for array in (virtual.keys, virtual.values)
        )
        return keys, values


def _positions(count: int) -> Int[Array, "1 virtual"]:
    return jnp.arange(count, dtype=jnp.int32)[None]


def _side_by_side(
    of_virtual: Sequence[RunBlock], of_tokens: Sequence[RunBlock]
) -> Sequence[RunBlock]:
    """Returns functions that run a block on virtual tokens, and then on tokens that see them."""
    made: dict[tuple[RunBlock, RunBlock], RunBlock] = {}

    def make(run_virtual: RunBlock, run_tokens: RunBlock) -> RunBlock:
        def both(block: nnx.Module, hidden: Any, cache: LayerCache | None) -> tuple[Any, None]:
            del cache
            tokens, virtual = hidden
            virtual, keys = run_virtual(block, virtual, VirtualKeys())
            tokens, _ = run_tokens(block, tokens, keys)
            return (tokens, virtual), None

        return both

    # Blocks of one type must be run by the same function.
    for pair in zip(of_virtual, of_tokens, strict=True):
        if pair not in made:
            made[pair] = make(*pair)
    return [made[pair] for pair in zip(of_virtual, of_tokens, strict=True)]
