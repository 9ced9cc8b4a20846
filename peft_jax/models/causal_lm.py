"""Causal language models: hidden states, logits and caches, as pure functions of parameters.

B batch, T tokens, D embed, V vocab.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kernels_pallas.dispatch import use_implementation
from peft_jax.core import VIRTUAL, Kernel, Tree, VirtualTokens
from peft_jax.models.cache import KVCache
from peft_jax.models.logit_rule import PRODUCTS, LogitRule, head_products
from peft_jax.models.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM(Model):
    """A decoder-only language model that maps tokens to hidden states and logits; see `Model`."""

    takes_virtual_tokens: ClassVar[bool] = True

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
        """Returns the hidden states after the final norm.

        Args:
          params: Parameters.
          tokens: [B, T].
          positions: [B, T], for rotary embeddings or ALiBi. By default they count from 0 at the
            start of each segment or, with a cache, continue from each row's last token. Virtual
            tokens are not counted.
          segment_ids: [B, T]; 0 is padding, 1 and up number the sequences packed into a row, which
            do not attend to each other. By default a row is one sequence.
          cache: Keys and values of earlier tokens; the new ones are written after them. The caller
            must ensure that the cache has free slots.
          packed: Whether a row may hold several segments. False promises that each row is one
            segment padded at its end only, so that a fused kernel needs no mask.

        Returns:
          [B, T, D] in the compute dtype, and the updated cache, or None without one.

        Raises:
          ValueError: The parameters do not fit the model, T exceeds the cache's slots, or virtual
            tokens are bound, but the cache does not begin with them (see `start_cache`).
        """
        virtual: VirtualTokens | None = params.get(VIRTUAL)
        count = 0 if virtual is None else virtual.count
        if cache is not None:
            if cache.virtual != count:
                raise ValueError(
                    f"the parameters have {count} virtual tokens, but the cache begins with"
                    f" {cache.virtual}; make it by start_cache, with the same parameters"
                )
            virtual = None
            if tokens.shape[1] > cache.slots:
                raise ValueError(
                    f"there are {tokens.shape[1]} tokens per row, but the cache has"
                    f" {cache.slots} slots"
                )
            if segment_ids is None:
                segment_ids = jnp.ones_like(tokens)
            self._check_chunks(count, cache.slots)
            self._check_windows(count, cache.slots)
            if positions is None:
                positions = cache.next_positions(segment_ids)
            elif count:
                positions = positions + count
            cache = cache.append_tokens(positions, segment_ids)
        else:
            self.check_virtual_rows(
                count, tokens.shape[1], of_one_segment=segment_ids is None or not packed
            )
            if positions is None:
                positions = default_positions(tokens, segment_ids)
            if count:
                positions = positions + count
        with use_implementation(self.execution.kernels):
            return self._bind(params)(tokens, positions, segment_ids, cache, packed, virtual)

    def head_kernel(self, params: Tree) -> Kernel:
        """Returns the head, [D, V]; if tied, the transposed embedding."""
        return self._bind(params).head_kernel()

    @property
    def logit_rule(self) -> LogitRule:
        """Computes logits from the products of the head; plain unless the family has a rule."""
        return getattr(self.config, "logit_rule", PRODUCTS)

    def logits(
        self, params: Tree, hidden: Float[Array, "*batch embed"]
    ) -> Float32[Array, "*batch vocab"]:
        """Returns the logits of hidden states, in float32."""
        return self.logit_rule(head_products(hidden, self.head_kernel(params)))

    def __call__(
        self,
        params: Tree,
        tokens: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
    ) -> Float32[Array, "batch tokens vocab"]:
        """Returns the logits of `tokens`; see `hidden_states` for the arguments."""
        hidden, _ = self.hidden_states(params, tokens, positions=positions, segment_ids=segment_ids)
        return self.logits(params, hidden)

    def check_virtual(self, params: Mapping[str, Any]) -> None:
        """Raises ValueError if virtual tokens are bound, and layers have keys of several sizes."""
        super().check_virtual(params)
        counts = getattr(self.config, "kv_head_counts", ())
        if VIRTUAL in params and len(counts) > 1:
            raise ValueError(
                f"virtual tokens have keys of one size in all layers, but {self.model_type} has"
                " layers with other heads; choose a method that adapts kernels, such as lora"
            )

    def check_virtual_rows(self, virtual: int, tokens: int, *, of_one_segment: bool) -> None:
        """Rejects rows that do not fit after virtual tokens.

        Args:
          virtual: Number of virtual tokens.
          tokens: Number of tokens of a row, without the virtual tokens.
          of_one_segment: Whether rows hold one segment each, padded at its end.

        Raises:
          ValueError: There are virtual tokens, and the model has no positions for such rows, or
            they may hold several segments, and a sliding window is shorter than they are.
        """
        longest = getattr(self.config, "max_tokens", None)
        if virtual and longest is not None and virtual + tokens > longest:
            raise ValueError(
                f"rows of {tokens} tokens after {virtual} virtual tokens are too long, because the"
                f" model has positions for {longest}"
            )
        self._check_chunks(virtual, virtual + tokens)
        if not of_one_segment:
            self._check_windows(virtual, virtual + tokens)

    def _check_chunks(self, virtual: int, tokens: int) -> None:
        """Rejects rows whose later chunks would not attend to virtual tokens."""
        kinds = getattr(self.config, "layer_types", ())
        chunks = [kind.chunk for kind in kinds if kind.chunk is not None]
        if virtual and chunks and min(chunks) < tokens:
            raise ValueError(
                f"the model attends within chunks of {min(chunks)} tokens, but rows have {tokens}"
                f" with the {virtual} virtual tokens, which later chunks would not attend to; use"
                " shorter rows, or another method"
            )

    def _check_windows(self, virtual: int, tokens: int) -> None:
        """Rejects sliding windows that would count what lies between virtual tokens and a text."""
        kinds = getattr(self.config, "layer_types", ())
        windows = [kind.window for kind in kinds if kind.window is not None]
        if virtual and windows and min(windows) < tokens:
            raise ValueError(
                f"the model has a sliding window of {min(windows)} tokens, but rows have {tokens}"
                f" with the {virtual} virtual tokens, and other texts or padding may lie between"
                " them; train with data.packing off, or on shorter rows, and generate shorter texts"
            )

    def start_cache(
        self, params: Tree, batch: int, length: int, dtype: Any = jnp.float32
    ) -> KVCache:
        """Returns a cache for `batch` rows of up to `length` tokens, after any virtual tokens.

        Args:
          params: Parameters. If virtual tokens are bound, the cache begins with their keys and
            values, in slots of their own.
          batch: Number of rows.
          length: Number of tokens that a row can hold.
          dtype: Dtype of keys and values.
        """
        virtual: VirtualTokens | None = params.get(VIRTUAL)
        if virtual is None:
            return self.init_cache(batch, length, dtype)
        slots = virtual.count + length
        with use_implementation(self.execution.kernels):
            keys, values = self._bind(params).virtual_keys(virtual, slots=slots)
        return self.init_cache(batch, slots, dtype).begin_with(keys, values)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> KVCache:
        """Returns an empty cache for `batch` rows of up to `length` tokens."""
        config = self.config
        return KVCache.empty(
            layers=config.num_layers,
            batch=batch,
            slots=length,
            dims=getattr(
                config, "cache_dims", (config.num_kv_heads, config.head_dim, config.head_dim)
            ),
            dtype=jnp.dtype(dtype),
        )


def default_positions(
    tokens: Int[Array, "batch tokens"], segment_ids: Int[Array, "batch tokens"] | None
) -> Int[Array, "batch tokens"]:
    """Returns positions [B, T] that count from 0 at the start of each segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(starts, axis=1)
