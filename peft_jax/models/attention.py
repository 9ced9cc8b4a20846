"""Computes attention: with a fused kernel if supported, else dense or, for long rows, chunked.

B batch, T query tokens, S key tokens, K key-value heads, G query heads per key-value head, H head
dimension, V that of values. Grouped queries have an axis of their own, so keys and values are never
repeated.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from kernels_pallas.target_device import target_platform
from peft_jax.core.scopes import part
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
from peft_jax.models.chunked_attention import chunked_attention
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.fused_attention import fused_attention, why_not_fused
from peft_jax.models.layers import recomputed
from peft_jax.models.logit_rule import soft_cap
from peft_jax.models.splash_attention import splash_attention, why_not_splash
from peft_jax.parallel import active_mesh, over_shards, spans

Scores = Float32[Array, "batch kv_heads tokens group keys"]
Weights = Float[Array, "batch kv_heads tokens group keys"]

_log = logging.getLogger(__name__)

_LAYOUT_AXES = {
    "query_segments": ("batch", "sequence"),
    "key_segments": ("batch", None),
    "query_positions": ("batch", "sequence"),
    "key_positions": ("batch", None),
    "slopes": ("kv_heads", None),
}
"""Logical axes of a layout's arrays; those of keys are not sharded along the sequence."""

_DENSE_SCORES = 1024 * 1024
"""Largest number of scores per head and row (4 MiB) for which "auto" is dense."""


def choose_attention(name: str, *, tokens: int, keys: int, why_not_fused: str | None) -> str:
    """Returns the implementation that "auto" selects; other names are returned unchanged.

    Args:
      name: See `ExecutionSettings.attention`.
      tokens: T.
      keys: S.
      why_not_fused: Why the fused kernel cannot be used; None if it can.

    Raises:
      ValueError: `name` is "fused" and the fused kernel cannot be used.

    Example:
      >>> choose_attention("auto", tokens=4096, keys=4096, why_not_fused=None)
      'fused'
      >>> choose_attention("auto", tokens=512, keys=512, why_not_fused="it needs a GPU")
      'dense'
      >>> choose_attention("auto", tokens=4096, keys=4096, why_not_fused="it needs a GPU")
      'chunked'
      >>> choose_attention("auto", tokens=1, keys=100_000, why_not_fused="it needs a GPU")
      'dense'
    """
    if name == "fused" and why_not_fused is not None:
        raise ValueError(
            f"attention='fused' cannot be used here: {why_not_fused}; 'auto' uses it wherever it is"
            " supported"
        )
    if name != "auto":
        return name
    if why_not_fused is None:
        return "fused"
    return "dense" if tokens * keys <= _DENSE_SCORES else "chunked"


def make_attention(
    layout: AttentionLayout,
    *,
    tokens: int,
    keys: int,
    head_dim: int,
    value_dim: int | None = None,
    execution: ExecutionSettings,
) -> Attend:
    """Returns the attention function of all layers.

    It maps queries [B, T, K, G, H], already scaled by 1/sqrt(H), keys [B, S, K, H] and values
    [B, S, K, V] to outputs [B, T, K, G, V]. If the layout has sinks, it takes them too, [K, G].
    Everything that depends on the layout alone is computed here, once.

    Args:
      layout: Which keys each query attends to.
      tokens: T.
      keys: S.
      head_dim: H.
      value_dim: V; None for H.
      execution: Dtype of activations, and the implementation to use.

    Raises:
      ValueError: `execution.attention` is "fused" and the fused kernel cannot be used.
    """
    why_not, fused = _fused_kernel(
        layout, tokens, keys, (head_dim, value_dim or head_dim), execution.dtype
    )
    name = choose_attention(execution.attention, tokens=tokens, keys=keys, why_not_fused=why_not)
    _log_once(
        f"attention of {tokens} tokens to {keys} keys: {name}"
        + (f", because the fused kernel cannot be used: {why_not}" if why_not else "")
    )
    make = fused if name == "fused" else _MAKERS[name]
    if active_mesh() is None:
        return part("scores")(make(layout, tokens=tokens, keys=keys))
    return part("scores")(_sharded(make, layout, tokens=tokens, keys=keys))


def _fused_kernel(
    layout: AttentionLayout, tokens: int, keys: int, dims: tuple[int, int], dtype: jnp.dtype
) -> tuple[str | None, Callable[..., Attend]]:
    """Returns why the platform's fused kernel cannot be used, None if it can, and the kernel."""
    platform = target_platform()
    kernel = splash_attention if platform == "tpu" else fused_attention
    if spans(tokens, "sequence"):
        return 'the tokens of a row are sharded along "sequence"', kernel
    sizes: dict[str, Any] = {"tokens": tokens, "keys": keys}
    sizes |= {"head_dim": dims[0], "value_dim": dims[1]}
    if platform == "tpu":
        return why_not_splash(layout, dtype=dtype, **sizes), kernel
    return why_not_fused(layout, platform=platform, dtype=dtype, **sizes), kernel


@functools.lru_cache(maxsize=1024)
def _log_once(message: str) -> None:
    _log.info(message)


def _sharded(
    make: Callable[..., Attend], layout: AttentionLayout, *, tokens: int, keys: int
) -> Attend:
    """Returns attention of each device's shard of rows, heads and queries to all keys.

    If rows are sharded along "sequence", keys and values are gathered along it, which is cheap
    because there are few key-value heads. A device's queries then start at its offset in the row.
    """
    query_axes, key_axes = spans(tokens, "sequence"), spans(keys, "sequence")

    def local(
        query: Queries, key: Keys, value: Values, sinks: Sinks | None, start: Any, *arrays: Any
    ) -> Outputs:
        if key_axes:
            key, value = (jax.lax.all_gather(x, key_axes, axis=1, tiled=True) for x in (key, value))
        if query_axes:
            start = start + jax.lax.axis_index(query_axes) * query.shape[1]
        own = dataclasses.replace(
            layout, query_start=start, **dict(zip(_LAYOUT_AXES, arrays, strict=True))
        )
        attend = make(own, tokens=query.shape[1], keys=key.shape[1])
        return attend(query, key, value) if sinks is None else attend(query, key, value, sinks)

    def attend(query: Queries, key: Keys, value: Values, sinks: Sinks | None = None) -> Outputs:
        kv_spec = ("batch", "sequence", "kv_heads", None)
        arrays = (getattr(layout, name) for name in _LAYOUT_AXES)
        return over_shards(
            local,
            (query, key, value, sinks, layout.query_start, *arrays),
            (
                ("batch", "sequence", "kv_heads", None, None),
                kv_spec,
                kv_spec,
                ("kv_heads", None),
                (),
                *_LAYOUT_AXES.values(),
            ),
        )

    return attend


def dense_attention(layout: AttentionLayout, *, tokens: int, keys: int) -> Attend:
    """Returns attention that stores all scores [B, K, T, G, S]; see `make_attention`.

    The mask is added rather than selected with, so that the backward pass saves the weights (in
    the dtype of the values) and nothing else.
    """
    query_index = layout.query_start + jnp.arange(tokens, dtype=jnp.int32)
    key_index = jnp.arange(keys, dtype=jnp.int32)
    seen = visible(layout, query_index, key_index, layout.query_segments, layout.key_segments)
    mask = jnp.where(seen, 0.0, MASKED).astype(jnp.float32)[:, None, :, None, :]

    def score(query: Queries, key: Keys) -> Scores:
        return jnp.einsum("btkgh,bskh->bktgs", query, key, preferred_element_type=jnp.float32)

    def capped_score(query: Queries, key: Keys) -> Scores:
        return soft_cap(score(query, key), cast(float, layout.score_cap))

    # The gradient of the cap needs the scores, which the backward pass computes again.
    scores_of = score if layout.score_cap is None else recomputed(capped_score)

    def attend(query: Queries, key: Keys, value: Values, sinks: Sinks | None = None) -> Outputs:
        scores = scores_of(query, key)
        bias = alibi(layout, layout.query_positions, layout.key_positions)
        if bias is not None:
            scores += bias
        if sinks is None:
            weights = _softmax(scores + mask, value.dtype)
        else:
            weights = _softmax_with_sinks(scores + mask, sinks, value.dtype)
        # einsum would transpose the weights, which are the largest array here.
        mixed = jax.lax.dot_general(weights, value, (((4,), (1,)), ((0, 1), (0, 2))))
        return jnp.swapaxes(mixed, 1, 2)

    return attend


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(scores: Scores, dtype: jnp.dtype) -> Weights:
    """Returns the softmax over the last axis in `dtype`, computed in float32.

    The backward pass saves the result only.
    """
    unnormalized = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return (unnormalized * (1.0 / unnormalized.sum(axis=-1, keepdims=True))).astype(dtype)


def _softmax_forward(scores: Scores, dtype: jnp.dtype) -> tuple[Weights, Weights]:
    weights = _softmax(scores, dtype)
    return weights, weights


def _softmax_backward(dtype: jnp.dtype, weights: Weights, gradient: Weights) -> tuple[Scores]:
    del dtype
    product = weights.astype(jnp.float32) * gradient.astype(jnp.float32)
    return (product - weights.astype(jnp.float32) * product.sum(axis=-1, keepdims=True),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _softmax_with_sinks(scores: Scores, sinks: Sinks, dtype: jnp.dtype) -> Weights:
    """Returns the softmax over the keys and a head's sink, without the sink's own weight.

    The backward pass saves the result and the sinks' weights.
    """
    return _with_sinks(scores, sinks, dtype)[0]


def _with_sinks(
    scores: Scores, sinks: Sinks, dtype: jnp.dtype
) -> tuple[Weights, Float32[Array, "batch kv_heads tokens group 1"]]:
    """Returns the weights of the keys, and those of the sinks."""
    sinks = sinks[:, None, :, None]
    largest = jnp.maximum(scores.max(axis=-1, keepdims=True), sinks)
    unnormalized, of_sinks = jnp.exp(scores - largest), jnp.exp(sinks - largest)
    inverse = 1.0 / (unnormalized.sum(axis=-1, keepdims=True) + of_sinks)
    return (unnormalized * inverse).astype(dtype), of_sinks * inverse


def _with_sinks_forward(
    scores: Scores, sinks: Sinks, dtype: jnp.dtype
) -> tuple[Weights, tuple[Weights, Array]]:
    weights, of_sinks = _with_sinks(scores, sinks, dtype)
    return weights, (weights, of_sinks)


def _with_sinks_backward(
    dtype: jnp.dtype, kept: tuple[Weights, Array], gradient: Weights
) -> tuple[Scores, Sinks]:
    weights, of_sinks = kept
    (of_scores,) = _softmax_backward(dtype, weights, gradient)
    product = weights.astype(jnp.float32) * gradient.astype(jnp.float32)
    mean = product.sum(axis=-1, keepdims=True)
    return of_scores, -jnp.sum(of_sinks * mean, axis=(0, 2, 4))


_softmax_with_sinks.defvjp(_with_sinks_forward, _with_sinks_backward)


_MAKERS: dict[str, Callable[..., Attend]] = {
    "dense": dense_attention,
    "chunked": chunked_attention,
}
