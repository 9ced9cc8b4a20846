"""Decoder of BLOOM: ALiBi, a fused map to queries, keys and values, and LayerNorms.

Axes: B batch, T tokens, D embed, K heads, H head dimension, V vocab.

Source: BigScience Workshop, 2022, arXiv 2211.05100.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from peft_jax.core import Kernel
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_positive, check_positive_int
from peft_jax.models.attention import make_attention
from peft_jax.models.attention_layout import Attend, AttentionLayout, alibi_slopes
from peft_jax.models.blocks import RunBlock, run_blocks, stack_blocks
from peft_jax.models.cache import KVCache, LayerCache
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layers import Embedding, LayerNorm, Linear, recomputed
from peft_jax.models.virtual_inputs import CausalDecoder

Hidden = Float[Array, "batch tokens embed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BloomConfig:
    """Architecture of a BLOOM model.

    Attributes:
      vocab_size: V.
      hidden_size: D; the MLP has 4 D features.
      num_layers: Number of transformer blocks.
      num_heads: K; divides D.
      norm_epsilon: Added to the variance in every norm.
      residual_after_norm: Whether a sub-layer's output is added to its normalized input
        (`apply_residual_connection_post_layernorm`).
      tie_word_embeddings: Whether the head is the transposed embedding.
      initializer_range: Initial standard deviation of kernels and embeddings.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    norm_epsilon: float = 1e-5
    residual_after_norm: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
            check_positive_int(name, getattr(self, name))
        check_positive("norm_epsilon", self.norm_epsilon)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but must be a multiple of num_heads ="
                f" {self.num_heads}"
            )

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads, K."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads


def _linear(config: BloomConfig, d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
    stddev = config.initializer_range
    return Linear(d_in, d_out, axes=axes, bias=True, stddev=stddev)


class BloomAttention(nnx.Module):
    """Multi-head attention; the output of the fused map has the layout [K, 3, H]."""

    def __init__(self, config: BloomConfig):
        self.config = config
        embed = config.hidden_size
        self.query_key_value = _linear(config, embed, 3 * embed, ("embed", "heads"))
        self.dense = _linear(config, embed, embed, ("heads", "embed"))

    @part("attention")
    def __call__(
        self, x: Hidden, attend: Attend, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns attention's output [B, T, D], and the layer's updated cache if one is given."""
        config = self.config
        leading = x.shape[:2]
        (fused,) = Linear.each(x, self.query_key_value)
        fused = fused.reshape(*leading, config.num_heads, 3, config.head_dim)
        query, key, value = (fused[..., i, :] for i in range(3))
        if cache is not None:
            cache = cache.append(key, value)
            key, value = cache.read(x.dtype)
        out = attend(query[:, :, :, None] * config.head_dim**-0.5, key, value)
        return self.dense(out.reshape(*leading, -1)), cache


class BloomMLP(nnx.Module):
    """The MLP with the tanh form of GELU (Hendrycks and Gimpel, 2016, arXiv 1606.08415)."""

    def __init__(self, config: BloomConfig):
        embed, mlp = config.hidden_size, 4 * config.hidden_size
        self.dense_h_to_4h = _linear(config, embed, mlp, ("embed", "mlp"))
        self.dense_4h_to_h = _linear(config, mlp, embed, ("mlp", "embed"))

    @part("mlp")
    def __call__(self, x: Hidden) -> Hidden:
        """Returns the MLP's output, [B, T, D]."""
        activation = recomputed(functools.partial(jax.nn.gelu, approximate=True))
        (hidden,) = Linear.each(x, self.dense_h_to_4h)
        return self.dense_4h_to_h(activation(hidden))


class BloomBlock(nnx.Module):
    """One transformer block: attention, then the MLP, each after a norm and added to its input."""

    def __init__(self, config: BloomConfig):
        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon)

        self.config = config
        self.input_layernorm = norm()
        self.self_attention = BloomAttention(config)
        self.post_attention_layernorm = norm()
        self.mlp = BloomMLP(config)

    def __call__(
        self, x: Hidden, attend: Attend, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        after_norm = self.config.residual_after_norm
        normed = self.input_layernorm(x)
        attended, cache = self.self_attention(normed, attend, cache)
        x = (normed if after_norm else x) + attended
        normed = self.post_attention_layernorm(x)
        return (normed if after_norm else x) + self.mlp(normed), cache


class Bloom(CausalDecoder):
    """The decoder: embedding and its norm, blocks, final norm, head.

    Args:
      config: Architecture.
      execution: Execution settings.
    """

    def __init__(self, config: BloomConfig, execution: ExecutionSettings):
        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon)

        self.config, self.execution = config, execution
        stddev = config.initializer_range
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, stddev=stddev)
        self.word_embeddings_layernorm = norm()
        self.layers = stack_blocks(lambda: BloomBlock(config), config.num_layers)
        self.ln_f = norm()
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size,
                config.vocab_size,
                axes=("embed", "vocab"),
                bias=False,
                stddev=stddev,
            )

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Hidden:
        """Returns the embeddings of tokens, in the compute dtype."""
        return self.word_embeddings(tokens, self.execution.dtype)

    def block_input(self, embedded: Hidden, positions: Int[Array, "batch tokens"]) -> Hidden:
        """Returns the norm of the embeddings."""
        del positions
        return self.word_embeddings_layernorm(embedded)

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
        """Returns the function that runs each layer's block, the same for all layers."""
        del longest
        tokens = positions.shape[1]
        slopes = jnp.asarray(alibi_slopes(self.config.num_heads))[:, None]
        layout = AttentionLayout.causal(segment_ids, cache, packed=packed, virtual=virtual)
        attend = make_attention(
            layout.with_alibi(slopes, positions, cache),
            tokens=tokens,
            keys=tokens + virtual if cache is None else cache.slots,
            head_dim=self.config.head_dim,
            execution=self.execution,
        )
        return [lambda block, x, layer_cache: block(x, attend, layer_cache)] * (
            self.config.num_layers
        )

    def run(
        self, runs: Sequence[RunBlock], hidden: Any, cache: KVCache | None, keys: Any = None
    ) -> tuple[Any, KVCache | None]:
        """Passes the first block's input through all blocks."""
        return run_blocks(
            self.layers, runs, hidden, cache=cache, execution=self.execution, virtual=keys
        )

    def finish(self, hidden: Hidden) -> Hidden:
        """Returns the final norm of the last block's output."""
        return self.ln_f(hidden)

    def head_kernel(self) -> Kernel:
        """Returns the head, [embed, vocab]; if tied, the transposed embedding."""
        if self.config.tie_word_embeddings:
            return self.word_embeddings.embedding.get_value().T
        return self.lm_head.kernel.get_value()
