"""Computes attention in blocks of queries and keys, without storing all scores.

B batch, T query tokens, S key tokens, K key-value heads, G query heads per key-value head, H head
dimension. In both passes, only the scores of one block of queries and one block of keys exist at a
time. The forward pass keeps a running softmax. It saves one value per query, the log of the
softmax's sum, from which the backward pass recomputes each block's probabilities. Fully masked
blocks are skipped.

Source: Dao, 2023, arXiv 2307.08691, algorithms 1 and 2, as XLA loops on every backend.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float32, Int

from peft_jax.models.attention_layout import (
    MASKED,
    Attend,
    AttentionLayout,
    Keys,
    Outputs,
    Queries,
    Sinks,
    Values,
    alibi,
    visible,
)
from peft_jax.models.logit_rule import soft_cap

LogSums = Float32[Array, "batch kv_heads tokens group"]
Index = Int[Array, ""] | int

SAVED_NAMES = ("attention_output", "attention_log_sum")
"""Checkpoint names of the saved values besides queries, keys and values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block sizes and counts of the padded queries and keys.

    Attributes:
      query: Number of tokens per block of queries.
      key: Number of tokens per block of keys.
      queries: Number of blocks of queries.
      keys: Number of blocks of keys.
    """

    query: int
    key: int
    queries: int
    keys: int


def chunked_attention(
    layout: AttentionLayout, *, tokens: int, keys: int, block: int = 512
) -> Attend:
    """Returns attention in blocks of at most `block` queries and keys; see `make_attention`."""
    query_block, key_block = min(block, tokens), min(block, keys)
    blocks = Blocks(
        query=query_block,
        key=key_block,
        queries=-(-tokens // query_block),
        keys=-(-keys // key_block),
    )
    query_padding = blocks.queries * query_block - tokens
    key_padding = blocks.keys * key_block - keys
    padded = dataclasses.replace(
        layout,
        query_segments=_pad(layout.query_segments, query_padding),
        key_segments=_pad(layout.key_segments, key_padding),
        query_positions=_pad(layout.query_positions, query_padding),
        key_positions=_pad(layout.key_positions, key_padding),
    )

    def attend(query: Queries, key: Keys, value: Values, sinks: Sinks | None = None) -> Outputs:
        query = _pad(query, query_padding)
        key, value = _pad(key, key_padding), _pad(value, key_padding)
        return _attention(blocks, query, key, value, padded, sinks)[:, :tokens]

    return attend


def _pad(array: Any, count: int) -> Any:
    """Appends `count` zeros along axis 1.

    No query attends to padded keys: they come after it or, without causal order, have segment 0.
    """
    if array is None or not count:
        return array
    return jnp.pad(array, ((0, 0), (0, count)) + ((0, 0),) * (array.ndim - 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    blocks: Blocks,
    query: Queries,
    key: Keys,
    value: Values,
    layout: AttentionLayout,
    sinks: Sinks | None,
) -> Outputs:
    return _forward(blocks, query, key, value, layout, sinks)[0]


def _attention_forward(
    blocks: Blocks,
    query: Queries,
    key: Keys,
    value: Values,
    layout: AttentionLayout,
    sinks: Sinks | None,
) -> tuple[Outputs, Any]:
    out, log_sums = _forward(blocks, query, key, value, layout, sinks)
    out, log_sums = map(checkpoint_name, (out, log_sums), SAVED_NAMES)
    return out, (query, key, value, layout, sinks, out, log_sums)


def _forward(
    blocks: Blocks,
    query: Queries,
    key: Keys,
    value: Values,
    layout: AttentionLayout,
    sinks: Sinks | None,
) -> tuple[Outputs, LogSums]:
    """Returns attention's output and the log of every query's softmax sum, its sink included."""

    def query_block(_: None, i: Index) -> tuple[None, Any]:
        query_i = _take(query, i, blocks.query)

        def key_block(j: Index, state: Any) -> Any:
            largest, total, out = state
            scores = _scores(blocks, query_i, _take(key, j, blocks.key), layout, i, j)
            larger = jnp.maximum(largest, scores.max(axis=-1))
            weights = jnp.exp(scores - larger[..., None])
            shrink = jnp.exp(largest - larger)
            value_j = _take(value, j, blocks.key)
            out = out * shrink[..., None] + _matmul("bktgs,bskh->bktgh", weights, value_j)
            return larger, total * shrink + weights.sum(axis=-1), out

        batch, tokens, kv_heads, group, _ = query_i.shape
        shape = (batch, kv_heads, tokens, group)
        if sinks is None:
            largest, total = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
        else:
            # The sum begins with the sink, whose value is zero.
            largest = jnp.broadcast_to(sinks[:, None, :], shape)
            total = jnp.ones(shape, jnp.float32)
        start = (largest, total, jnp.zeros((*shape, value.shape[-1]), jnp.float32))
        first, end = _key_block_range(blocks, layout, i)
        largest, total, out = jax.lax.fori_loop(first, end, key_block, start)
        out = (out / total[..., None]).astype(query.dtype)
        return None, (out.transpose(0, 2, 1, 3, 4), largest + jnp.log(total))

    indices = jnp.arange(blocks.queries, dtype=jnp.int32)
    _, (out, log_sums) = jax.lax.scan(query_block, None, indices)
    return _join(out, 1), _join(log_sums, 2)


def _attention_backward(blocks: Blocks, residuals: Any, grad_out: Outputs) -> tuple:
    """Returns the gradients of queries, keys and values, computed one block of keys at a time."""
    query, key, value, layout, sinks, out, log_sums = residuals
    # The gradient of a softmax subtracts its mean under the weights, which is <dO, O>.
    means = jnp.einsum("btkgh,btkgh->bktg", grad_out, out, preferred_element_type=jnp.float32)

    def key_block(grad_query: Any, j: Index) -> tuple[Any, Any]:
        key_j, value_j = _take(key, j, blocks.key), _take(value, j, blocks.key)

        def query_block(i: Index, state: Any) -> Any:
            grad_query, grad_key, grad_value = state
            query_i, grad_out_i = (_take(a, i, blocks.query) for a in (query, grad_out))
            log_sums_i, means_i = (_take(a, i, blocks.query, axis=2) for a in (log_sums, means))
            scores = _scores(blocks, query_i, key_j, layout, i, j)
            weights = jnp.exp(scores - log_sums_i[..., None])
            grad_value += _matmul("bktgs,btkgh->bskh", weights, grad_out_i)
            grad_weights = _matmul("btkgh,bskh->bktgs", grad_out_i, value_j)
            grad_scores = weights * (grad_weights - means_i[..., None])
            if layout.score_cap is not None:
                # A masked score is far below the cap, where the slope is zero.
                share = jnp.maximum(scores / layout.score_cap, -1.0)
                grad_scores *= 1.0 - jnp.square(share)
            grad_key += _matmul("bktgs,btkgh->bskh", grad_scores, query_i)
            update = _matmul("bktgs,bskh->btkgh", grad_scores, key_j)
            update += _take(grad_query, i, blocks.query)
            grad_query = jax.lax.dynamic_update_slice_in_dim(
                grad_query, update, i * blocks.query, axis=1
            )
            return grad_query, grad_key, grad_value

        start = (grad_query, *(jnp.zeros(a.shape, jnp.float32) for a in (key_j, value_j)))
        first, end = _query_block_range(blocks, layout, j)
        grad_query, grad_key, grad_value = jax.lax.fori_loop(first, end, query_block, start)
        return grad_query, (grad_key.astype(key.dtype), grad_value.astype(value.dtype))

    grad_query, (grad_key, grad_value) = jax.lax.scan(
        key_block,
        jnp.zeros(query.shape, jnp.float32),
        jnp.arange(blocks.keys, dtype=jnp.int32),
    )
    grad_sinks = None
    if sinks is not None:
        of_sinks = jnp.exp(sinks[:, None, :] - log_sums)
        grad_sinks = -jnp.sum(of_sinks * means, axis=(0, 2))
    grads = (grad_query.astype(query.dtype), _join(grad_key, 1), _join(grad_value, 1))
    return *grads, None, grad_sinks


_attention.defvjp(_attention_forward, _attention_backward)


def _scores(
    blocks: Blocks, query: Queries, key: Keys, layout: AttentionLayout, i: Index, j: Index
) -> Float32[Array, "batch kv_heads tokens group keys"]:
    """Returns the masked scores of query block i against key block j."""
    query_index = layout.query_start + i * blocks.query + jnp.arange(blocks.query, dtype=jnp.int32)
    key_index = j * blocks.key + jnp.arange(blocks.key, dtype=jnp.int32)

    def take_queries(array: Any) -> Any:
        return None if array is None else _take(array, i, blocks.query)

    def take_keys(array: Any) -> Any:
        return None if array is None else _take(array, j, blocks.key)

    scores = _matmul("btkgh,bskh->bktgs", query, key)
    if layout.score_cap is not None:
        scores = soft_cap(scores, layout.score_cap)
    bias = alibi(layout, take_queries(layout.query_positions), take_keys(layout.key_positions))
    if bias is not None:
        scores += bias
    seen = visible(
        layout,
        query_index,
        key_index,
        take_queries(layout.query_segments),
        take_keys(layout.key_segments),
    )
    return jnp.where(seen[:, None, :, None, :], scores, MASKED)


def _key_block_range(blocks: Blocks, layout: AttentionLayout, i: Index) -> tuple[Any, Any]:
    """Returns the range [first, end) of key blocks that query block i attends to."""
    first_query = layout.query_start + i * blocks.query
    last_key = first_query + blocks.query - 1
    if not layout.is_causal:
        if layout.window is None:
            return jnp.zeros((), jnp.int32), jnp.full((), blocks.keys, jnp.int32)
        last_key = last_key + layout.window - 1
    end = jnp.minimum(last_key // blocks.key + 1, blocks.keys)
    if layout.window is None:
        return jnp.zeros_like(end), end
    return jnp.maximum(first_query - layout.window + 1, 0) // blocks.key, end


def _query_block_range(blocks: Blocks, layout: AttentionLayout, j: Index) -> tuple[Any, Any]:
    """Returns the range [first, end) of query blocks that attend to key block j."""
    first_key = j * blocks.key - layout.query_start
    first_query = first_key
    if not layout.is_causal:
        if layout.window is None:
            return jnp.zeros((), jnp.int32), jnp.full((), blocks.queries, jnp.int32)
        first_query = first_key - layout.window + 1
    first = jnp.maximum(first_query, 0) // blocks.query
    if layout.window is None:
        return first, jnp.full_like(first, blocks.queries)
    last_query = first_key + blocks.key - 1 + layout.window - 1
    return first, jnp.clip(last_query // blocks.query + 1, 0, blocks.queries)


def _take(array: Any, block: Index, size: int, *, axis: int = 1) -> Any:
    """Returns one block of an array along its tokens."""
    return jax.lax.dynamic_slice_in_dim(array, block * size, size, axis=axis)


def _matmul(axes: str, left: Any, right: Any) -> Any:
    """Multiplies blocks in the dtype of `right`, accumulating in float32."""
    left = left.astype(right.dtype)
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _join(blocks: Any, axis: int) -> Any:
    """Concatenates blocks [blocks, ..., tokens, ...] along the token axis `axis` of the result."""
    moved = jnp.moveaxis(blocks, 0, axis)
    shape = moved.shape
    return moved.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
