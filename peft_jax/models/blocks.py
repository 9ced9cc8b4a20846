"""Runs stacked transformer blocks, scanned or unrolled, with rematerialization.

L layers, B batch, T tokens, D embed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from peft_jax.core import LINEAR_OUTPUT
from peft_jax.models.cache import KVCache, LayerCache
from peft_jax.models.chunked_attention import SAVED_NAMES
from peft_jax.models.execution import ExecutionSettings
from peft_jax.parallel import constrain_features

Hidden = Float[Array, "batch tokens embed"]
RunBlock = Callable[[nnx.Module, Hidden, LayerCache | None], tuple[Hidden, LayerCache | None]]

_BLOCK_INPUT = "block_input"


def stack_blocks(make: Callable[[], nnx.Module], layers: int) -> nnx.Module:
    """Returns one module that stacks the parameters of `layers` blocks along a leading axis."""
    return nnx.vmap(make, in_axes=(), out_axes=0, axis_size=layers)()


def run_blocks(
    blocks: nnx.Module,
    run: RunBlock,
    hidden: Hidden,
    *,
    layers: int,
    cache: KVCache | None,
    execution: ExecutionSettings,
) -> tuple[Hidden, KVCache | None]:
    """Passes `hidden` through the blocks in order.

    Args:
      blocks: Stacked blocks.
      run: Runs one block, given the block, its input and its layer of the cache.
      hidden: [B, T, D].
      layers: L.
      cache: Keys and values of earlier tokens, or None. It already holds the positions and
        segments of the new tokens.
      execution: Whether to scan or unroll, and the rematerialization.

    Returns:
      [B, T, D], and the cache with every layer's new keys and values.
    """
    graphdef, stacked = nnx.split(blocks)
    start = jnp.zeros((), jnp.int32) if cache is None else cache.length - hidden.shape[1]

    def body(carry: Any, layer: Any) -> tuple[Any, None]:
        hidden, keys_values = carry
        state, index = layer
        hidden = checkpoint_name(constrain_features(hidden, "embed"), _BLOCK_INPUT)
        layer_cache = None
        if keys_values is not None:
            keys, values = keys_values
            layer_cache = LayerCache(keys=keys, values=values, layer=index, start=start)
        hidden, layer_cache = run(nnx.merge(graphdef, state), hidden, layer_cache)
        if layer_cache is not None:
            keys_values = (layer_cache.keys, layer_cache.values)
        return (hidden, keys_values), None

    body = rematerialized(body, execution.remat, inside_scan=execution.scan_layers)
    carry = (hidden, None if cache is None else (cache.keys, cache.values))
    if execution.scan_layers:
        indices = jnp.arange(layers, dtype=jnp.int32)
        carry, _ = jax.lax.scan(body, carry, (stacked, indices))
    else:
        for index, state in enumerate(unstack(stacked, layers)):
            carry, _ = body(carry, (state, jnp.int32(index)))
    hidden, keys_values = carry
    if cache is not None and keys_values is not None:
        keys, values = keys_values
        cache = dataclasses.replace(cache, keys=keys, values=values)
    return hidden, cache


def unstack(stacked: Any, layers: int) -> list[Any]:
    """Splits a tree of stacked leaves [L, ...] into L trees.

    The gradient of a split is one concatenation. That of L indexing operations would be L arrays of
    the full size.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    slices = [jnp.unstack(leaf, axis=0) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [parts[i] for parts in slices]) for i in range(layers)]


def rematerialized(body: Callable, remat: str, *, inside_scan: bool) -> Callable:
    """Wraps `body` in the rematerialization policy `remat`; see `ExecutionSettings.remat`."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    if remat == "full":
        policy = policies.nothing_saveable
    elif remat == "dots":
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(LINEAR_OUTPUT, *SAVED_NAMES),
        )
    else:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(body, policy=policy, prevent_cse=not inside_scan)
