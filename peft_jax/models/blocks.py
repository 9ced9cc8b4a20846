"""Runs stacked transformer blocks, scanned or unrolled, with rematerialization.

L layers, B batch, T tokens, D embed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from peft_jax.core import LINEAR_OUTPUT, AdaptedKernel
from peft_jax.core.product_names import (
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    LOW_RANK_INPUT,
    MLP_INPUT,
    MLP_OUTPUT,
)
from peft_jax.models.cache import KVCache, LayerCache, VirtualKeys
from peft_jax.models.chunked_attention import SAVED_NAMES
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layer_types import Segment, find_segments
from peft_jax.models.mixed_blocks import MixedBlocks, layers_of_leaves, rows_in
from peft_jax.parallel import constrain_features

Hidden = Float[Array, "batch tokens embed"]
RunBlock = Callable[[nnx.Module, Any, LayerCache | None], tuple[Any, LayerCache | None]]
"""Runs a block on its input, given its layer of the cache."""

_BLOCK_INPUT = "block_input"

_SAVED = {
    "products": (ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT),
    "attention": (ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_OUTPUT),
}
"""Names of the products that a policy saves."""


def stack_blocks(make: Callable[[], nnx.Module], layers: int) -> nnx.Module:
    """Returns one module that stacks the parameters of `layers` blocks along a leading axis."""
    return nnx.vmap(make, in_axes=(), out_axes=0, axis_size=layers)()


def run_blocks(
    blocks: nnx.Module,
    runs: Sequence[RunBlock],
    hidden: Any,
    *,
    cache: KVCache | None,
    execution: ExecutionSettings,
    virtual: VirtualKeys | None = None,
) -> tuple[Any, KVCache | None]:
    """Passes `hidden` through the blocks in order.

    Blocks that are run by the same function are of one type, and of one form. A scan compiles one
    period of types, so that a model of any depth compiles a few blocks only.

    Args:
      blocks: Stacked blocks.
      runs: For each of the L layers, runs its block, given the block, its input and its layer of
        the cache.
      hidden: [B, T, D], or a tuple of such arrays if `runs` take one.
      cache: Keys and values of earlier tokens, or None. It already holds the positions and
        segments of the new tokens.
      execution: Whether to scan or unroll, and the rematerialization.
      virtual: Keys and values of virtual tokens in every layer, [L, n, K, H], passed to `runs` in
        place of the layer's cache; None without.

    Returns:
      [B, T, D] (or a tuple of such), and the cache with every layer's new keys and values.
    """
    graphdef, state = nnx.split(blocks)
    stacked = (state, virtual)
    start = jnp.zeros((), jnp.int32) if cache is None else cache.length - hidden.shape[1]

    def block_of(number: int, state: Any) -> nnx.Module:
        if isinstance(blocks, MixedBlocks):
            return blocks.block(number, state)
        return nnx.merge(graphdef, state)

    def body(number: int, carry: Any, layer: Any) -> tuple[Any, None]:
        hidden, keys_values = carry
        (state, layer_cache), index = layer
        hidden = jax.tree.map(
            lambda x: checkpoint_name(constrain_features(x, "embed"), _BLOCK_INPUT), hidden
        )
        if keys_values is not None:
            keys, values = keys_values
            layer_cache = LayerCache(keys=keys, values=values, layer=index, start=start)
        hidden, layer_cache = runs[number](block_of(number, state), hidden, layer_cache)
        if keys_values is not None and layer_cache is not None:
            keys_values = (layer_cache.keys, layer_cache.values)
        return (hidden, keys_values), None

    def body_of(number: int, *, alone: bool) -> Callable:
        own = functools.partial(body, number)
        return rematerialized(own, execution.remat, inside_scan=alone)

    carry = (hidden, None if cache is None else (cache.keys, cache.values))
    segments = find_segments(runs)
    if not execution.scan_layers:
        for index, state in enumerate(unstack(stacked, len(runs))):
            carry, _ = body_of(index, alone=False)(carry, (state, jnp.int32(index)))
    elif len(segments) == 1 and segments[0].period == 1:
        indices = jnp.arange(len(runs), dtype=jnp.int32)
        carry, _ = jax.lax.scan(body_of(0, alone=True), carry, (stacked, indices))
    else:
        for segment in segments:
            own = range(segment.start, segment.start + segment.period)
            bodies = [body_of(number, alone=segment.period == 1) for number in own]
            carry = _scan_segment(bodies, carry, stacked, segment, frozen=cache is not None)
    hidden, keys_values = carry
    if cache is not None and keys_values is not None:
        keys, values = keys_values
        cache = dataclasses.replace(cache, keys=keys, values=values)
    return hidden, cache


def _scan_segment(
    bodies: Sequence[Callable], carry: Any, stacked: Any, segment: Segment, *, frozen: bool
) -> Any:
    """Scans the periods of a segment.

    A scan over some of the layers would copy their parameters. So leaves that need no gradient are
    indexed in place, and only the others are passed to the scan, which sums no gradients of whole
    leaves.

    Args:
      bodies: Runs each layer of a period.
      carry: What a body passes on.
      stacked: Parameters of all layers.
      segment: Layers to run.
      frozen: Whether no leaf needs a gradient.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    in_place = [frozen or one for one in _need_no_gradient(stacked)]
    rows = [rows_in(layers, segment) for layers in layers_of_leaves(stacked)]
    count = segment.repeats

    def periods(leaf: Any, before: int, places: tuple[int | None, ...]) -> Any:
        each = len(places) - places.count(None)
        return leaf[before : before + count * each].reshape(count, each, *leaf.shape[1:])

    def run_period(carry: Any, scanned: tuple[Any, list[Any]]) -> tuple[Any, None]:
        number, slices = scanned
        for place, body in enumerate(bodies):
            own = iter(slices)
            state: list[Any] = []
            for leaf, whole, (before, places) in zip(leaves, in_place, rows, strict=True):
                of_period, row = None if whole else next(own), places[place]
                if row is None:
                    state.append(None)
                elif of_period is None:
                    at = before + number * (len(places) - places.count(None)) + row
                    state.append(jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False))
                else:
                    state.append(of_period[row])
            index = segment.start + number * segment.period + place
            carry, _ = body(carry, (jax.tree.unflatten(treedef, state), index))
        return carry, None

    numbers = jnp.arange(count, dtype=jnp.int32)
    slices = [
        periods(leaf, *own)
        for leaf, whole, own in zip(leaves, in_place, rows, strict=True)
        if not whole
    ]
    return jax.lax.scan(run_period, carry, (numbers, slices))[0]


def _need_no_gradient(stacked: Any) -> list[bool]:
    """Returns for each leaf whether training with adapters keeps it frozen.

    If any kernel is adapted, or there are virtual tokens, these are all leaves but the adapters'
    arrays. A leaf that is trained along with them gets its gradient too, though more slowly.
    """
    nodes = jax.tree.leaves(stacked, is_leaf=_is_trained)
    if not any(map(_is_trained, nodes)):
        return [False] * len(jax.tree.leaves(stacked))

    def mark(node: Any) -> Any:
        if isinstance(node, VirtualKeys):
            return jax.tree.map(lambda _: False, node)
        if not _is_trained(node):
            return jax.tree.map(lambda _: True, node)
        arrays = jax.tree.map(lambda _: False, node)
        return dataclasses.replace(arrays, base=mark(node.base))

    return [one for node in nodes for one in jax.tree.leaves(mark(node))]


def _is_trained(node: Any) -> bool:
    return isinstance(node, AdaptedKernel | VirtualKeys)


def unstack(stacked: Any, layers: int) -> list[Any]:
    """Splits a tree of stacked leaves [L, ...] into L trees.

    Leaves of some layers only are None in the trees of others. The gradient of a split is one
    concatenation. That of L indexing operations would be L arrays of the full size.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    slices = [
        dict(zip(own or range(layers), jnp.unstack(leaf, axis=0), strict=True))
        for leaf, own in zip(leaves, layers_of_leaves(stacked), strict=True)
    ]
    return [jax.tree.unflatten(treedef, [parts.get(i) for parts in slices]) for i in range(layers)]


def rematerialized(body: Callable, remat: str, *, inside_scan: bool) -> Callable:
    """Wraps `body` in the rematerialization policy `remat`; see `ExecutionSettings.remat`."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    if remat == "full":
        policy = policies.nothing_saveable
    elif remat in _SAVED:
        policy = policies.save_only_these_names(*_SAVED[remat], LOW_RANK_INPUT, *SAVED_NAMES)
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
