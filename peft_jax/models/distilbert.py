"""Encoder of DistilBERT with a classification or regression head.

Its blocks compute what BERT's do, under other names.

Axes: B batch, T tokens, D embed, K heads, H head dimension, F feed-forward, C labels.

Source: Sanh et al., 2019, arXiv 1910.01108.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from peft_jax.core.scopes import part
from peft_jax.models.attention import make_attention
from peft_jax.models.attention_layout import Attend, AttentionLayout
from peft_jax.models.bert import BertConfig, BertEmbeddings, Hidden
from peft_jax.models.blocks import run_blocks, stack_blocks
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layers import LayerNorm, Linear, recomputed
from peft_jax.models.nonlinearities import ACTIVATIONS


def _linear(config: BertConfig, d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
    return Linear(d_in, d_out, axes=axes, bias=True, stddev=config.initializer_range)


class DistilBertAttention(nnx.Module):
    """Bidirectional multi-head attention."""

    def __init__(self, config: BertConfig):
        self.config = config
        embed = config.hidden_size
        self.q_lin = _linear(config, embed, embed, ("embed", "heads"))
        self.k_lin = _linear(config, embed, embed, ("embed", "kv_heads"))
        self.v_lin = _linear(config, embed, embed, ("embed", "kv_heads"))
        self.out_lin = _linear(config, embed, embed, ("heads", "embed"))

    def __call__(self, x: Hidden, attend: Attend) -> Hidden:
        """Returns attention's output, [B, T, D]."""
        config = self.config
        shape = (*x.shape[:2], config.num_heads, config.head_dim)
        maps = Linear.each(x, self.q_lin, self.k_lin, self.v_lin)
        query, key, value = (y.reshape(shape) for y in maps)
        out = attend(query[:, :, :, None] * config.head_dim**-0.5, key, value)
        return self.out_lin(out.reshape(x.shape))


class DistilBertMLP(nnx.Module):
    """The feed-forward layer: two linear maps with a nonlinearity between them."""

    def __init__(self, config: BertConfig):
        self.activation = config.activation
        embed, mlp = config.hidden_size, config.intermediate_size
        self.lin1 = _linear(config, embed, mlp, ("embed", "mlp"))
        self.lin2 = _linear(config, mlp, embed, ("mlp", "embed"))

    def __call__(self, x: Hidden) -> Hidden:
        """Returns the layer's output, [B, T, D]."""
        (hidden,) = Linear.each(x, self.lin1)
        return self.lin2(recomputed(ACTIVATIONS[self.activation])(hidden))


class DistilBertBlock(nnx.Module):
    """One transformer block: attention, then the feed-forward layer, a norm after each."""

    def __init__(self, config: BertConfig):
        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon)

        self.attention = DistilBertAttention(config)
        self.sa_layer_norm = norm()
        self.ffn = DistilBertMLP(config)
        self.output_layer_norm = norm()

    def __call__(self, x: Hidden, attend: Attend) -> Hidden:
        """Returns the block's output, [B, T, D]."""
        return self._mlp(self._attention(x, attend))

    @part("attention")
    def _attention(self, x: Hidden, attend: Attend) -> Hidden:
        return self.sa_layer_norm(self.attention(x, attend) + x)

    @part("mlp")
    def _mlp(self, attended: Hidden) -> Hidden:
        return self.output_layer_norm(self.ffn(attended) + attended)


class DistilBert(nnx.Module):
    """The encoder: embeddings, blocks, head.

    Args:
      config: Architecture, without token types.
      execution: Execution settings.
    """

    def __init__(self, config: BertConfig, execution: ExecutionSettings):
        self.config, self.execution = config, execution
        embed = config.hidden_size
        self.embeddings = BertEmbeddings(config)
        self.layers = stack_blocks(lambda: DistilBertBlock(config), config.num_layers)
        # Both axes are the residual stream's, and one mesh axis can shard only one of them.
        self.pre_classifier = _linear(config, embed, embed, ("embed", "norm"))
        self.classifier = _linear(config, embed, config.num_labels, ("embed", "norm"))

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        token_types: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"],
    ) -> Hidden:
        """Returns the hidden states after the last block, [B, T, D]."""
        count = tokens.shape[1]
        attend = make_attention(
            AttentionLayout.bidirectional(segment_ids),
            tokens=count,
            keys=count,
            head_dim=self.config.head_dim,
            execution=self.execution,
        )
        hidden, _ = run_blocks(
            self.layers,
            [lambda block, x, cache: (block(x, attend), cache)] * self.config.num_layers,
            self.embeddings(tokens, token_types, positions, self.execution.dtype),
            cache=None,
            execution=self.execution,
        )
        return hidden

    def classify(
        self, hidden: Hidden, segment_ids: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch labels"]:
        """Returns the head's output [B, C] from the hidden states of each row's first token."""
        del segment_ids
        return self.classifier(jax.nn.relu(self.pre_classifier(hidden[:, 0])))
