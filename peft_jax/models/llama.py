"""Decoder of the Llama family: Llama 1 to 3, Vicuna, Mistral, Qwen2 and Qwen3.

All members share one module. Their differences (biases, norms on queries and keys, sliding window,
tied embeddings, rotary scaling) are fields of `LlamaConfig`.

Axes: B batch, T tokens, D embed, K key-value heads, G query heads per key-value head, H head
dimension, F mlp, V vocab.

Sources: Touvron et al., 2023 (arXiv 2302.13971, 2307.09288); Grattafiori et al., 2024 (arXiv
2407.21783); Jiang et al., 2023 (arXiv 2310.06825); Yang et al., 2024 and 2025 (arXiv 2407.10671,
2505.09388).
"""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from peft_jax.core import Kernel
from peft_jax.core.scopes import part
from peft_jax.core.validation import check_positive, check_positive_int
from peft_jax.models.attention import make_attention
from peft_jax.models.attention_layout import Attend, AttentionLayout
from peft_jax.models.blocks import run_blocks, stack_blocks
from peft_jax.models.cache import KVCache, LayerCache
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layers import Embedding, Linear, RMSNorm, recomputed
from peft_jax.models.rope import RotarySettings, rotate

Hidden = Float[Array, "batch tokens embed"]
Rotation = tuple[Float32[Array, "batch tokens pairs"], Float32[Array, "batch tokens pairs"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Architecture of a model of the Llama family.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      intermediate_size: F.
      num_layers: Number of transformer blocks.
      num_heads: Number of query heads, K G.
      num_kv_heads: K; divides `num_heads`.
      head_dim: H; need not be D / num_heads.
      rotary: Rotary embedding.
      norm_epsilon: Added to the mean square in every norm.
      max_positions: Longest context of pretraining, in tokens.
      tie_word_embeddings: Whether the head is the transposed embedding.
      qkv_bias: Whether queries, keys and values have biases.
      output_bias: Whether attention's output map has a bias.
      mlp_bias: Whether the three maps of the MLP have biases.
      qk_norm: Whether each head's queries and keys pass an RMS norm before the rotation.
      sliding_window: Number of tokens that a token attends to, itself included; None for all.
      initializer_range: Initial standard deviation of kernels and embeddings.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotarySettings
    norm_epsilon: float
    max_positions: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            check_positive_int(name, getattr(self, name))
        check_positive("norm_epsilon", self.norm_epsilon)
        if self.sliding_window is not None:
            check_positive_int("sliding_window", self.sliding_window)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, but must be a multiple of num_kv_heads ="
                f" {self.num_kv_heads}"
            )


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary positions (Ainslie et al., 2023, arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig):
        self.config = config
        width, kv_width = (
            heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)
        )

        def project(d_in: int, d_out: int, axes: tuple[str, str], *, bias: bool) -> Linear:
            stddev = config.initializer_range
            return Linear(d_in, d_out, axes=axes, bias=bias, stddev=stddev)

        embed, bias = config.hidden_size, config.qkv_bias
        self.q_proj = project(embed, width, ("embed", "heads"), bias=bias)
        self.k_proj = project(embed, kv_width, ("embed", "kv_heads"), bias=bias)
        self.v_proj = project(embed, kv_width, ("embed", "kv_heads"), bias=bias)
        self.o_proj = project(width, embed, ("heads", "embed"), bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, epsilon=config.norm_epsilon)
            self.k_norm = RMSNorm(config.head_dim, epsilon=config.norm_epsilon)

    @part("attention")
    def __call__(
        self, x: Hidden, rotation: Rotation, attend: Attend, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns attention's output [B, T, D], and the layer's updated cache if one is given."""
        config = self.config
        leading, group = x.shape[:2], config.num_heads // config.num_kv_heads
        query, key, value = Linear.each(x, self.q_proj, self.k_proj, self.v_proj)
        query = query.reshape(*leading, config.num_kv_heads, group, config.head_dim)
        key = key.reshape(*leading, config.num_kv_heads, config.head_dim)
        value = value.reshape(*leading, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, *rotation, scale=config.head_dim**-0.5)
        key = rotate(key, *rotation)
        if cache is not None:
            cache = cache.append(key, value)
            key, value = cache.read(x.dtype)
        out = attend(query, key, value)
        return self.o_proj(out.reshape(*leading, -1)), cache


class LlamaMLP(nnx.Module):
    """The gated MLP down(silu(gate(x)) * up(x)) (Shazeer, 2020, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        def project(d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
            return Linear(
                d_in,
                d_out,
                axes=axes,
                bias=config.mlp_bias,
                stddev=config.initializer_range,
            )

        embed, mlp = config.hidden_size, config.intermediate_size
        self.gate_proj = project(embed, mlp, ("embed", "mlp"))
        self.up_proj = project(embed, mlp, ("embed", "mlp"))
        self.down_proj = project(mlp, embed, ("mlp", "embed"))

    @part("mlp")
    def __call__(self, x: Hidden) -> Hidden:
        """Returns the MLP's output, [B, T, D]."""
        gated = recomputed(lambda gate, up: jax.nn.silu(gate) * up)
        return self.down_proj(gated(*Linear.each(x, self.gate_proj, self.up_proj)))


class LlamaBlock(nnx.Module):
    """One transformer block: attention, then the MLP, each after a norm and added to its input."""

    def __init__(self, config: LlamaConfig):
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, epsilon=config.norm_epsilon)

        self.input_layernorm = norm()
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = norm()
        self.mlp = LlamaMLP(config)

    def __call__(
        self, x: Hidden, rotation: Rotation, attend: Attend, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.self_attn(self.input_layernorm(x), rotation, attend, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """The decoder: embedding, blocks, final norm, head.

    Args:
      config: Architecture.
      execution: Execution settings.
    """

    def __init__(self, config: LlamaConfig, execution: ExecutionSettings):
        self.config, self.execution = config, execution
        stddev = config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, stddev=stddev)
        self.layers = stack_blocks(lambda: LlamaBlock(config), config.num_layers)
        self.norm = RMSNorm(config.hidden_size, epsilon=config.norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size,
                config.vocab_size,
                axes=("embed", "vocab"),
                bias=False,
                stddev=stddev,
            )

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"] | None,
        cache: KVCache | None,
        packed: bool,
    ) -> tuple[Hidden, KVCache | None]:
        """Returns the hidden states after the final norm, and the updated cache if one is given."""
        layout = AttentionLayout.causal(
            segment_ids, cache, window=self.config.sliding_window, packed=packed
        )
        attend = make_attention(
            layout,
            tokens=tokens.shape[1],
            keys=tokens.shape[1] if cache is None else cache.slots,
            head_dim=self.config.head_dim,
            execution=self.execution,
        )
        rotation = self.config.rotary.tables(positions)
        hidden, cache = run_blocks(
            self.layers,
            [lambda block, x, layer_cache: block(x, rotation, attend, layer_cache)]
            * self.config.num_layers,
            self.embed_tokens(tokens, self.execution.dtype),
            cache=cache,
            execution=self.execution,
        )
        return self.norm(hidden), cache

    def head_kernel(self) -> Kernel:
        """Returns the head, [embed, vocab]; if tied, the transposed embedding."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding.get_value().T
        return self.lm_head.kernel.get_value()
