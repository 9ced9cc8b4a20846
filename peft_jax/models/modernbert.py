"""Encoder of ModernBERT with a classification or regression head.

Norms stand before the sub-layers, positions are rotations, and most layers are local: a token
attends to a window around it. Queries, keys and values come from one fused map, and so do the two
factors of the MLP.

Axes: B batch, T tokens, D embed, K heads, H head dimension, F feed-forward, C labels.

Source: Warner et al., 2024, arXiv 2412.13663; Marone et al., 2025, arXiv 2509.06888 (mmBERT).
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from peft_jax.core.scopes import part
from peft_jax.core.validation import check_choice, check_positive, check_positive_int
from peft_jax.models.attention import make_attention
from peft_jax.models.attention_layout import Attend, AttentionLayout
from peft_jax.models.bert import Hidden
from peft_jax.models.blocks import RunBlock, run_blocks, stack_blocks
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layers import Embedding, LayerNorm, Linear, recomputed
from peft_jax.models.nonlinearities import ACTIVATIONS
from peft_jax.models.rope import RotarySettings, rotate

Rotation = tuple[Float32[Array, "batch tokens pairs"], Float32[Array, "batch tokens pairs"]]

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Types of layers, by their names in transformers."""

POOLINGS = ("cls", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """Architecture of a ModernBERT.

    Attributes:
      vocab_size: Number of rows of the token embedding.
      hidden_size: D.
      num_heads: K; divides D.
      intermediate_size: F.
      layer_types: Type of each block, `GLOBAL` or `LOCAL`.
      window: Number of tokens that a token of a local block attends to on each side, itself
        included.
      rotary: Rotary embedding of global blocks.
      local_rotary: Rotary embedding of local blocks.
      max_positions: Longest context of pretraining, in tokens.
      num_labels: C; 1 for regression.
      pooling: What the head reads: the first token ("cls"), or the mean of all ("mean").
      activation: Nonlinearity of the MLP, a key of `ACTIVATIONS`.
      head_activation: Nonlinearity after the head's first map, a key of `ACTIVATIONS`.
      attention_bias: Whether the maps of attention have biases.
      mlp_bias: Whether the maps of the MLP have biases.
      norm_bias: Whether norms have biases.
      head_bias: Whether the head's first map has a bias.
      norm_epsilon: Added to the variance in every norm.
      initializer_range: Initial standard deviation of kernels and embeddings.

    Raises:
      ValueError: A size is not positive, heads do not divide D, or a name is unknown.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    window: int
    rotary: RotarySettings
    local_rotary: RotarySettings
    max_positions: int
    num_labels: int = 2
    pooling: str = "cls"
    activation: str = "gelu"
    head_activation: str = "gelu"
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    head_bias: bool = False
    norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        for name in (*sizes, "window", "max_positions", "num_labels"):
            check_positive_int(name, getattr(self, name))
        check_positive("norm_epsilon", self.norm_epsilon)
        for name in ("activation", "head_activation"):
            check_choice(name, getattr(self, name), ACTIVATIONS)
        for kind in self.layer_types:
            check_choice("a layer's type", kind, (GLOBAL, LOCAL))
        check_choice("pooling", self.pooling, POOLINGS)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but must be a multiple of num_heads ="
                f" {self.num_heads}"
            )

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.layer_types)

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads, K."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads

    @property
    def tie_word_embeddings(self) -> bool:
        """False: the head is not the transposed embedding."""
        return False

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens per row; rotations have no last position."""
        return 2**31 - 1

    @property
    def output_range(self) -> float:
        """Initial standard deviation of the maps that add to the residual stream."""
        return self.initializer_range / (2.0 * self.num_layers) ** 0.5


def _norm(config: ModernBertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon, bias=config.norm_bias)


class ModernBertEmbeddings(nnx.Module):
    """The normalized token embeddings."""

    def __init__(self, config: ModernBertConfig):
        self.tok_embeddings = Embedding(
            config.vocab_size, config.hidden_size, stddev=config.initializer_range
        )
        self.norm = _norm(config)

    def __call__(self, tokens: Int[Array, "batch tokens"], dtype: jnp.dtype) -> Hidden:
        """Returns the embedded tokens [B, T, D], in `dtype`."""
        return self.norm(self.tok_embeddings(tokens, dtype))


class ModernBertAttention(nnx.Module):
    """Bidirectional multi-head attention; the fused map's output has the layout [3, K, H]."""

    def __init__(self, config: ModernBertConfig):
        self.config = config
        embed, bias = config.hidden_size, config.attention_bias
        self.Wqkv = Linear(
            embed, 3 * embed, axes=("embed", "heads"), bias=bias, stddev=config.initializer_range
        )
        self.Wo = Linear(
            embed, embed, axes=("heads", "embed"), bias=bias, stddev=config.output_range
        )

    @part("attention")
    def __call__(self, x: Hidden, rotation: Rotation, attend: Attend) -> Hidden:
        """Returns attention's output, [B, T, D]."""
        config = self.config
        (fused,) = Linear.each(x, self.Wqkv)
        fused = fused.reshape(*x.shape[:2], 3, config.num_heads, config.head_dim)
        query, key, value = (fused[:, :, i] for i in range(3))
        query = rotate(query, *rotation, scale=config.head_dim**-0.5)
        out = attend(query[:, :, :, None], rotate(key, *rotation), value)
        return self.Wo(out.reshape(x.shape))


class ModernBertMLP(nnx.Module):
    """The gated MLP Wo(activation(a) * b), where Wi gives a and b (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModernBertConfig):
        self.activation = config.activation
        embed, mlp, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.Wi = Linear(
            embed, 2 * mlp, axes=("embed", "mlp"), bias=bias, stddev=config.initializer_range
        )
        self.Wo = Linear(mlp, embed, axes=("mlp", "embed"), bias=bias, stddev=config.output_range)

    @part("mlp")
    def __call__(self, x: Hidden) -> Hidden:
        """Returns the MLP's output, [B, T, D]."""
        activation = ACTIVATIONS[self.activation]
        gated = recomputed(lambda first, second: activation(first) * second)
        (fused,) = Linear.each(x, self.Wi)
        return self.Wo(gated(*jnp.split(fused, 2, axis=-1)))


class ModernBertBlock(nnx.Module):
    """One transformer block: attention, then the MLP, each after a norm and added to its input."""

    def __init__(self, config: ModernBertConfig):
        self.attn_norm = _norm(config)
        self.attn = ModernBertAttention(config)
        self.mlp_norm = _norm(config)
        self.mlp = ModernBertMLP(config)

    def __call__(self, x: Hidden, rotation: Rotation, attend: Attend, *, is_first: bool) -> Hidden:
        """Returns the block's output; the first block's input has passed the embeddings' norm."""
        x = x + self.attn(x if is_first else self.attn_norm(x), rotation, attend)
        return x + self.mlp(self.mlp_norm(x))


class ModernBertPredictionHead(nnx.Module):
    """The first layer of the head, which pretraining for masked words has trained."""

    def __init__(self, config: ModernBertConfig):
        self.activation = config.head_activation
        # Both axes are the residual stream's, and one mesh axis can shard only one of them.
        self.dense = Linear(
            config.hidden_size,
            config.hidden_size,
            axes=("embed", "norm"),
            bias=config.head_bias,
            stddev=config.output_range,
        )
        self.norm = _norm(config)

    def __call__(self, pooled: Float[Array, "batch embed"]) -> Float[Array, "batch embed"]:
        """Returns norm(activation(dense(pooled))), [B, D]."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(pooled)))


class ModernBert(nnx.Module):
    """The encoder: embeddings, blocks, final norm, head.

    Args:
      config: Architecture.
      execution: Execution settings.
    """

    def __init__(self, config: ModernBertConfig, execution: ExecutionSettings):
        self.config, self.execution = config, execution
        self.embeddings = ModernBertEmbeddings(config)
        self.layers = stack_blocks(lambda: ModernBertBlock(config), config.num_layers)
        self.final_norm = _norm(config)
        self.head = ModernBertPredictionHead(config)
        self.classifier = Linear(
            config.hidden_size,
            config.num_labels,
            axes=("embed", "norm"),
            bias=True,
            stddev=config.hidden_size**-0.5,
        )

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        token_types: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"],
    ) -> Hidden:
        """Returns the hidden states after the final norm, [B, T, D]."""
        del token_types
        hidden, _ = run_blocks(
            self.layers,
            self._runs(positions, segment_ids),
            self.embeddings(tokens, self.execution.dtype),
            cache=None,
            execution=self.execution,
        )
        return self.final_norm(hidden)

    def _runs(
        self, positions: Int[Array, "batch tokens"], segment_ids: Int[Array, "batch tokens"]
    ) -> list[RunBlock]:
        """Returns the function that runs each block; blocks of one type have the same."""
        config, count = self.config, positions.shape[1]

        def runner(kind: str) -> Callable[..., RunBlock]:
            rotary = config.rotary if kind == GLOBAL else config.local_rotary
            rotation = rotary.tables(positions)
            window = None if kind == GLOBAL else config.window
            attend = make_attention(
                AttentionLayout.bidirectional(segment_ids, window=window),
                tokens=count,
                keys=count,
                head_dim=config.head_dim,
                execution=self.execution,
            )
            return lambda is_first: (
                lambda block, x, cache: (block(x, rotation, attend, is_first=is_first), cache)
            )

        runners = {kind: runner(kind) for kind in dict.fromkeys(config.layer_types)}
        later = {kind: make(is_first=False) for kind, make in runners.items()}
        first = runners[config.layer_types[0]](is_first=True)
        return [first, *(later[kind] for kind in config.layer_types[1:])]

    def classify(
        self, hidden: Hidden, segment_ids: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch labels"]:
        """Returns the head's output [B, C] from each row's first token, or its tokens' mean."""
        if self.config.pooling == "cls":
            return self.classifier(self.head(hidden[:, 0]))
        counted = (segment_ids > 0).astype(jnp.float32)
        total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), counted)
        # A row of padding has no tokens.
        mean = total / jnp.maximum(counted.sum(axis=1, keepdims=True), 1.0)
        return self.classifier(self.head(mean.astype(hidden.dtype)))
