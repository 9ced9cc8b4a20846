"""Attention in one fused kernel: cuDNN's, on NVIDIA GPUs.

B batch, T tokens, K key-value heads, G query heads a key-value head, H head dimension.

The kernel never holds the scores, as `chunked_attention`, and keeps the matrix units busy, as XLA's
loops do not. Causal order and a sliding window are part of it. Segments packed into a row are not:
they go in as a mask over [B, T, T], which is why long packed rows are left to `chunked_attention`.

Source: Dao, 2023, arXiv 2307.08691, as implemented by cuDNN behind `jax.nn.dot_product_attention`.
"""

import jax
import jax.numpy as jnp

from peft_jax.models.attention_layout import Attend, AttentionLayout, Keys, Queries, visible

LONGEST_MASKED = 8192
"""Tokens of a row up to which a mask is given to the kernel: it takes 128 MiB a row in bfloat16."""

_LARGEST_HEAD = 128
"""cuDNN's limit on every GPU; on Hopper it goes to 256 forwards and, for some shapes, backwards."""


def why_not_fused(
    layout: AttentionLayout,
    *,
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    tokens: int,
    keys: int,
) -> str | None:
    """Returns why the fused kernel cannot compute this attention, or None if it can.

    Args:
      layout: Who may attend to whom.
      platform: What the program is traced for: "cpu", "gpu" or "tpu".
      dtype: Dtype of queries, keys and values.
      head_dim: H.
      tokens: T.
      keys: S.

    Example:
      >>> layout = AttentionLayout.causal(None, None)
      >>> sizes = {"head_dim": 64, "tokens": 1024, "keys": 1024}
      >>> why_not_fused(layout, platform="cpu", dtype=jnp.dtype("bfloat16"), **sizes)
      'it is for GPUs, and this is for a cpu'
      >>> why_not_fused(layout, platform="gpu", dtype=jnp.dtype("float32"), **sizes)
      'it is for bfloat16 and float16, and activations are float32'
      >>> why_not_fused(layout, platform="gpu", dtype=jnp.dtype("bfloat16"), **sizes) is None
      True
    """
    if platform != "gpu":
        return f"it is for GPUs, and this is for a {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it is for bfloat16 and float16, and activations are {dtype.name}"
    if head_dim % 8 or head_dim > _LARGEST_HEAD:
        return (
            f"it takes head dimensions that are multiples of 8 up to {_LARGEST_HEAD}, not"
            f" {head_dim}"
        )
    if layout.slopes is not None:
        return "it has no ALiBi"
    if layout.cached or tokens != keys:
        return "keys come from a cache"
    if _needs_mask(layout) and tokens > LONGEST_MASKED:
        return f"a mask of packed segments is given to it up to {LONGEST_MASKED} tokens a row"
    if _needs_mask(layout) and tokens % 2:
        return f"with a mask it takes an even number of tokens, not {tokens}"
    return None


def fused_attention(layout: AttentionLayout, *, tokens: int, keys: int) -> Attend:
    """Attention by cuDNN's kernel; see `make_attention`.

    The caller must ensure that `why_not_fused` has no reason against it.
    """
    mask = None
    if _needs_mask(layout):
        index = jnp.arange(tokens, dtype=jnp.int32)
        mask = visible(layout, index, index, layout.query_segments, layout.key_segments)[:, None]

    def attend(query: Queries, key: Keys, value: Keys) -> Queries:
        batch, length, kv_heads, group, head_dim = query.shape
        out = jax.nn.dot_product_attention(
            query.reshape(batch, length, kv_heads * group, head_dim),
            key,
            value,
            mask=mask,
            scale=1.0,
            is_causal=not layout.sees_later,
            local_window_size=None if layout.window is None else (layout.window - 1, 0),
            implementation="cudnn",
        )
        return out.reshape(query.shape)

    return attend


def _needs_mask(layout: AttentionLayout) -> bool:
    """Whether order and window alone do not say who sees whom.

    Padding after the last token is not seen by the tokens before it, so that a causal row of one
    segment needs none.
    """
    return layout.query_segments is not None and (layout.packed or layout.sees_later)
