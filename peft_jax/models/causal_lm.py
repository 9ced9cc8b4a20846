"""A causal language model as pure functions of its parameters.

B batch, T tokens, D embed, V vocab.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kernels_pallas.dispatch import use_implementation
from peft_jax.core import Kernel, Tree, linear
from peft_jax.models.cache import KVCache
from peft_jax.models.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM(Model):
    """A decoder-only language model: from tokens to hidden states and logits; see `Model`."""

    def hidden_states(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        cache: KVCache | None = None,
        packed: bool = True,
    ) -> tuple[Float[Array, "batch tokens embed"], KVCache | None]:
        """The hidden states after the final norm.

        Args:
          params: the parameters.
          tokens: [B, T].
          positions: [B, T], for rotary embeddings or ALiBi; by default they count from 0 at every
            segment's start or, with a cache, go on from each row's last token.
          segment_ids: [B, T]: 0 is padding, 1 and up are sequences packed in a row, which do not
            see each other; by default a row is one sequence.
          cache: the earlier tokens' keys and values; the tokens are written after them. It is for
            the caller to see that there are slots left.
          packed: whether a row may hold several segments. False promises that each row is one
            segment with padding after it only, which saves a fused kernel its mask.

        Returns:
          [B, T, D] in the compute dtype; and the cache with these tokens, or None without one.

        Raises:
          ValueError: the parameters are not this model's, or more tokens than slots in the cache.
        """
        if cache is not None:
            if tokens.shape[1] > cache.slots:
                raise ValueError(f"{tokens.shape[1]} tokens do not fit a cache of {cache.slots}")
            if segment_ids is None:
                segment_ids = jnp.ones_like(tokens)
            if positions is None:
                positions = cache.following_positions(segment_ids)
            cache = cache.admit(positions, segment_ids)
        elif positions is None:
            positions = default_positions(tokens, segment_ids)
        with use_implementation(self.execution.kernels):
            return self._bound(params)(tokens, positions, segment_ids, cache, packed)

    def head_kernel(self, params: Tree) -> Kernel:
        """The map from hidden states to logits, [D, V]; if tied, the transposed embedding."""
        return self._bound(params).head_kernel()

    def logits(
        self, params: Tree, hidden: Float[Array, "*batch embed"]
    ) -> Float32[Array, "*batch vocab"]:
        """The logits of hidden states, in float32."""
        kernel = self.head_kernel(params)
        if isinstance(kernel, jax.Array):
            kernel = kernel.astype(hidden.dtype)
            return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return linear(hidden, kernel).astype(jnp.float32)

    def __call__(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float32[Array, "batch tokens vocab"]:
        """The logits of `tokens`; arguments as for `hidden_states`."""
        hidden, _ = self.hidden_states(params, tokens, positions=positions, segment_ids=segment_ids)
        return self.logits(params, hidden)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> KVCache:
        """An empty cache for `batch` rows of up to `length` tokens."""
        config = self.config
        return KVCache.empty(
            layers=config.num_layers,
            batch=batch,
            slots=length,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=jnp.dtype(dtype),
        )


def default_positions(
    tokens: Int[Array, "batch tokens"], segment_ids: Int[Array, "batch tokens"] | None
) -> Int[Array, "batch tokens"]:
    """Positions that count from 0 at the start of the row or of each segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(starts, axis=1)
