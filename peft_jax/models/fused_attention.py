"""Computes attention with cuDNN's fused kernel, on NVIDIA GPUs.

B batch, T tokens, K key-value heads, G query heads per key-value head, H head dimension.

Like `chunked_attention`, the kernel never stores all scores, and it is faster than XLA's loops. It
supports causal order and a sliding window. Segments packed into a row need a mask [B, T, T], which
is why long packed rows use `chunked_attention`.

Source: Dao, 2023, arXiv 2307.08691, as implemented by cuDNN behind `jax.nn.dot_product_attention`.
"""

import jax
import jax.numpy as jnp

from peft_jax.models.attention_layout import (
    Attend,
    AttentionLayout,
    Keys,
    Outputs,
    Queries,
    Values,
    visible,
)

MAX_MASKED_TOKENS = 8192
"""Longest row, in tokens, that gets a mask: 128 MiB per row in bfloat16."""

_MAX_HEAD_DIM = 128
"""cuDNN's limit on every GPU. Hopper allows 256, but in the backward pass for some shapes only."""


def why_not_fused(
    layout: AttentionLayout,
    *,
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    value_dim: int | None = None,
    tokens: int,
    keys: int,
) -> str | None:
    """Returns why the fused kernel cannot compute this attention, or None if it can.

    Args:
      layout: Which keys each query attends to.
      platform: Platform the program is compiled for: "cpu", "gpu" or "tpu".
      dtype: Dtype of queries, keys and values.
      head_dim: H.
      value_dim: Head dimension of values; None for H.
      tokens: T.
      keys: S.

    Example:
      >>> layout = AttentionLayout.causal(None, None)
      >>> sizes = {"head_dim": 64, "tokens": 1024, "keys": 1024}
      >>> why_not_fused(layout, platform="cpu", dtype=jnp.dtype("bfloat16"), **sizes)
      'it needs a GPU, but the platform is cpu'
      >>> why_not_fused(layout, platform="gpu", dtype=jnp.dtype("float32"), **sizes)
      'it needs bfloat16 or float16 activations, but they are float32'
      >>> why_not_fused(layout, platform="gpu", dtype=jnp.dtype("bfloat16"), **sizes) is None
      True
    """
    if platform != "gpu":
        return f"it needs a GPU, but the platform is {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16 activations, but they are {dtype.name}"
    if head_dim % 8 or head_dim > _MAX_HEAD_DIM:
        return (
            f"the head dimension must be a multiple of 8 up to {_MAX_HEAD_DIM}, but is {head_dim}"
        )
    if value_dim not in (None, head_dim):
        return f"values must have the head dimension of keys, {head_dim}, but have {value_dim}"
    if layout.slopes is not None:
        return "it does not support ALiBi"
    if layout.score_cap is not None:
        return "it does not support a soft cap of the scores"
    if layout.sinks:
        return "it does not support sinks"
    if layout.virtual:
        return "it does not support virtual tokens"
    if layout.cached or tokens != keys:
        return "it does not support keys from a cache"
    if _needs_mask(layout) and tokens > MAX_MASKED_TOKENS:
        return (
            f"packed rows may have up to {MAX_MASKED_TOKENS} tokens, because of their mask, but"
            f" have {tokens}"
        )
    if _needs_mask(layout) and tokens % 2:
        return f"packed rows must have an even number of tokens, but have {tokens}"
    return None


def fused_attention(layout: AttentionLayout, *, tokens: int, keys: int) -> Attend:
    """Returns attention by cuDNN's kernel; see `make_attention`.

    The caller must ensure that `why_not_fused` returns None.
    """
    mask = None
    if _needs_mask(layout):
        index = jnp.arange(tokens, dtype=jnp.int32)
        mask = visible(layout, index, index, layout.query_segments, layout.key_segments)[:, None]

    def attend(query: Queries, key: Keys, value: Values) -> Outputs:
        batch, length, kv_heads, group, head_dim = query.shape
        out = jax.nn.dot_product_attention(
            query.reshape(batch, length, kv_heads * group, head_dim),
            key,
            value,
            mask=mask,
            scale=1.0,
            is_causal=layout.is_causal,
            local_window_size=_window(layout),
            implementation="cudnn",
        )
        return out.reshape(query.shape)

    return attend


def _window(layout: AttentionLayout) -> tuple[int, int] | None:
    """Returns how many tokens before and after it a query attends to; None for all."""
    if layout.window is None:
        return None
    return layout.window - 1, 0 if layout.is_causal else layout.window - 1


def _needs_mask(layout: AttentionLayout) -> bool:
    """Returns whether causal order and the window alone cannot express the layout.

    A causal row of one segment needs no mask, because its tokens precede its padding.
    """
    return layout.query_segments is not None and (layout.packed or not layout.is_causal)
