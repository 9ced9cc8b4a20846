"""Computes attention with JAX's splash kernel, on TPUs.

B batch, T tokens, K key-value heads, G query heads per key-value head, H head dimension.

Like `chunked_attention`, the kernel never stores all scores, and it skips blocks that the causal
order or the window masks. It supports grouped heads, packed segments, a soft cap and sinks.

Source: Dao, 2023, arXiv 2307.08691, as implemented in `jax.experimental.pallas.ops.tpu`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from peft_jax.models.attention_layout import (
    Attend,
    AttentionLayout,
    Keys,
    Outputs,
    Queries,
    Sinks,
    Values,
)
from peft_jax.models.chunked_attention import SAVED_NAMES

_LANES = 128
"""Number of lanes of a TPU's vector registers, which divides the rows of a block."""
_LARGEST_BLOCK = 1024
"""Rows of a block. Larger blocks read keys and values less often. Their scores (4 MiB) and those of
the backward pass must fit in on-chip memory."""


def why_not_splash(
    layout: AttentionLayout,
    *,
    dtype: jnp.dtype,
    head_dim: int,
    value_dim: int | None = None,
    tokens: int,
    keys: int,
) -> str | None:
    """Returns why the splash kernel cannot compute this attention on a TPU, or None if it can.

    Args:
      layout: Which keys each query attends to.
      dtype: Dtype of queries, keys and values.
      head_dim: H.
      value_dim: Head dimension of values; None for H.
      tokens: T.
      keys: S.

    Example:
      >>> layout = AttentionLayout.causal(None, None)
      >>> sizes = {"dtype": jnp.dtype("bfloat16"), "head_dim": 128}
      >>> why_not_splash(layout, tokens=1000, keys=1000, **sizes)
      'rows must be a multiple of 128 tokens, but have 1000'
      >>> why_not_splash(layout, tokens=1024, keys=1024, **sizes) is None
      True
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16 activations, but they are {dtype.name}"
    for dim in (head_dim, value_dim or head_dim):
        if dim % 64:
            return f"the head dimension must be a multiple of 64, but is {dim}"
    if layout.slopes is not None:
        return "it does not support ALiBi"
    if layout.virtual:
        return "it does not support virtual tokens"
    if layout.cached or tokens != keys:
        return "it does not support keys from a cache"
    if tokens % _LANES:
        return f"rows must be a multiple of {_LANES} tokens, but have {tokens}"
    return None


def splash_attention(
    layout: AttentionLayout, *, tokens: int, keys: int, interpret: bool = False
) -> Attend:
    """Returns attention by the splash kernel; see `make_attention`.

    The caller must ensure that `why_not_splash` returns None.

    Args:
      layout: Which keys each query attends to.
      tokens: T.
      keys: S.
      interpret: Whether to interpret the kernel on any platform, slowly.
    """
    del keys
    needs_segments = layout.query_segments is not None and (layout.packed or not layout.is_causal)

    def attend(query: Queries, key: Keys, value: Values, sinks: Sinks | None = None) -> Outputs:
        batch, length, kv_heads, group, head_dim = query.shape
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([_mask(layout, tokens)] * (kv_heads * group)),
            block_sizes=_block_sizes(tokens),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=layout.score_cap,
            residual_checkpoint_name=SAVED_NAMES[0],
            interpret=interpret,
        )
        of_heads = None if sinks is None else sinks.reshape(kv_heads * group)
        segments = None
        if needs_segments:
            segments = splash.SegmentIds(layout.query_segments, layout.key_segments)
        heads_first = query.reshape(batch, length, kv_heads * group, head_dim).swapaxes(1, 2)
        out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids, sinks=of_heads))(
            heads_first, key.swapaxes(1, 2), value.swapaxes(1, 2), segments
        )
        return out.swapaxes(1, 2).reshape(*query.shape[:-1], value.shape[-1])

    return attend


def _mask(layout: AttentionLayout, tokens: int) -> masks.Mask:
    """Returns the mask of causal order and window; segments come on top of it."""
    shape = (tokens, tokens)
    if layout.window is not None and layout.window < tokens:
        after = 0 if layout.is_causal else layout.window - 1
        return masks.LocalMask(shape, (layout.window - 1, after), offset=0)
    return masks.CausalMask(shape) if layout.is_causal else masks.FullMask(shape)


@functools.cache
def _block_sizes(tokens: int) -> splash.BlockSizes:
    """Returns blocks of equal sizes, the largest that divide the row."""
    rows = next(
        rows for rows in range(min(tokens, _LARGEST_BLOCK), 0, -_LANES) if tokens % rows == 0
    )
    return splash.BlockSizes(
        block_q=rows,
        block_kv=rows,
        block_q_dkv=rows,
        block_kv_dkv=rows,
        block_q_dq=rows,
        block_kv_dq=rows,
    )
