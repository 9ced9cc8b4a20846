"""The decoder that families of language models share: embedding, blocks, final norm, head.

A family's file names its block and norm, and states what differs from this one; `decoder_parts` has
the parts that blocks are composed of. Layers of several types (sliding and full attention, say)
differ by their `LayerType`. If it names forms of blocks, these may have different parameters.

Axes: B batch, T tokens, D embed, K key-value heads, G query heads per key-value head, H head
dimension, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from peft_jax.core import Kernel
from peft_jax.core.validation import check_positive, check_positive_int
from peft_jax.models.attention import make_attention
from peft_jax.models.attention_layout import Attend, AttentionLayout
from peft_jax.models.blocks import RunBlock, run_blocks, stack_blocks
from peft_jax.models.cache import KVCache
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layer_types import LayerType
from peft_jax.models.layers import Embedding, Linear
from peft_jax.models.logit_rule import PRODUCTS, LogitRule
from peft_jax.models.mixed_blocks import MixedBlocks
from peft_jax.models.virtual_inputs import CausalDecoder

Hidden = Float[Array, "batch tokens embed"]
Rotation = tuple[Float32[Array, "batch tokens pairs"], Float32[Array, "batch tokens pairs"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Architecture that all families have; a family may add fields.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      intermediate_size: Number of features of the MLP.
      num_layers: Number of transformer blocks.
      num_heads: Number of query heads, K G.
      num_kv_heads: K; divides `num_heads`.
      head_dim: H; need not be D / num_heads.
      norm_epsilon: Added to the mean square, or to the variance, in every norm.
      max_positions: Longest context of pretraining, in tokens.
      layer_types: Types of the layers, repeated in order until there are `num_layers`.
      tie_word_embeddings: Whether the head is the transposed embedding.
      score_scale: Multiplier of attention's scores; None for 1/sqrt(H).
      score_cap: Soft cap of attention's scores; None for none.
      attention_sinks: Whether each head has a sink, a score that belongs to no token.
      logit_rule: Computes logits from the products of the head.
      initializer_range: Initial standard deviation of kernels and embeddings.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    max_positions: int
    layer_types: tuple[LayerType, ...]
    tie_word_embeddings: bool = False
    score_scale: float | None = None
    score_cap: float | None = None
    attention_sinks: bool = False
    logit_rule: LogitRule = PRODUCTS
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
        for name in ("score_scale", "score_cap"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if not self.layer_types:
            raise ValueError("layer_types is empty, but must have at least one type")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, but must be a multiple of num_kv_heads ="
                f" {self.num_kv_heads}"
            )

    @property
    def layers(self) -> tuple[LayerType, ...]:
        """Type of every layer."""
        count = len(self.layer_types)
        return tuple(self.layer_types[layer % count] for layer in range(self.num_layers))

    @property
    def value_dim(self) -> int:
        """Number of a head's features of values."""
        return self.head_dim

    def head_dims(self, kind: LayerType) -> tuple[int, int]:
        """Returns the head dimensions of a layer's keys and of its values."""
        del kind
        return self.head_dim, self.value_dim

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """Number of heads of a cache, and of their features of keys and of values."""
        return self.num_kv_heads, self.head_dim, self.value_dim

    @property
    def query_scale(self) -> float:
        """Multiplier of queries."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a block of one type needs besides its input; computed once for all its layers.

    Attributes:
      attend: Attention, with the type's window.
      rotation: Cosines and sines of the type's rotary embedding, or None.
      temperature: Multiplier of each token's query, or None.
    """

    attend: Attend
    rotation: Rotation | None
    temperature: Float32[Array, "batch tokens"] | None = None


class Decoder(CausalDecoder):
    """Embedding, blocks, final norm and head.

    A family is a subclass that sets `block`, or `forms` of blocks by name, and `make_norm`, which
    take its configuration. Where its checkpoints differ, it sets the names of the embedding and of
    the final norm.

    Args:
      config: Architecture.
      execution: Execution settings.
    """

    block: type[Any]
    forms: ClassVar[Mapping[str, type[Any]]] = {}
    embedding_name = "embed_tokens"
    norm_name = "norm"

    def __init__(self, config: DecoderConfig, execution: ExecutionSettings):
        self.config, self.execution = config, execution
        stddev = config.initializer_range
        embedding = Embedding(config.vocab_size, config.hidden_size, stddev=stddev)
        setattr(self, self.embedding_name, embedding)
        self.layers = self._stacked(config)
        setattr(self, self.norm_name, self.make_norm(config))
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size,
                config.vocab_size,
                axes=("embed", "vocab"),
                bias=False,
                stddev=stddev,
            )

    @classmethod
    def _stacked(cls, config: DecoderConfig) -> nnx.Module:
        """Returns the stacked blocks, of one form or of several."""
        forms = [kind.form for kind in config.layers]
        makes: dict[str, Callable[[], nnx.Module]] = {}
        for form in dict.fromkeys(forms):
            block: Callable[..., nnx.Module] = cls.forms[form] if form else cls.block
            makes[form] = functools.partial(block, config)
        if len(makes) == 1:
            return stack_blocks(makes[forms[0]], config.num_layers)
        return MixedBlocks(makes, forms)

    @staticmethod
    def make_norm(config: DecoderConfig) -> nnx.Module:
        """Returns the final norm."""
        raise NotImplementedError

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Hidden:
        """Returns the embeddings of tokens, in the compute dtype."""
        return getattr(self, self.embedding_name)(tokens, self.execution.dtype)

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
        """Returns the function that runs each layer's block; one for all layers of a type."""
        around = self._surroundings(positions, segment_ids, cache, packed, virtual, longest)
        runs = {
            kind: lambda block, x, layer_cache, own=own: block(x, own, layer_cache)
            for kind, own in around.items()
        }
        return [runs[kind] for kind in self.config.layers]

    def run(
        self, runs: Sequence[RunBlock], hidden: Any, cache: KVCache | None, keys: Any = None
    ) -> tuple[Any, KVCache | None]:
        """Passes the first block's input through all blocks."""
        return run_blocks(
            self.layers, runs, hidden, cache=cache, execution=self.execution, virtual=keys
        )

    def finish(self, hidden: Hidden) -> Hidden:
        """Returns the final norm of the last block's output."""
        return getattr(self, self.norm_name)(hidden)

    def _surroundings(
        self,
        positions: Int[Array, "batch tokens"],
        segment_ids: Int[Array, "batch tokens"] | None,
        cache: KVCache | None,
        packed: bool,
        virtual: int,
        longest: Any,
    ) -> dict[LayerType, Surroundings]:
        """Returns the surroundings of each type; equal windows and rotations are shared."""
        config, tokens = self.config, positions.shape[1]
        keys = tokens + virtual if cache is None else cache.slots
        kinds = tuple(dict.fromkeys(config.layers))
        attends = {
            (window, chunk, dims): make_attention(
                AttentionLayout.causal(
                    segment_ids,
                    cache,
                    window=window,
                    packed=packed,
                    score_cap=config.score_cap,
                    sinks=config.attention_sinks,
                    virtual=virtual,
                    chunk=chunk,
                    positions=positions,
                ),
                tokens=tokens,
                keys=keys,
                head_dim=dims[0],
                value_dim=dims[1],
                execution=self.execution,
            )
            for window, chunk, dims in dict.fromkeys(
                (kind.window, kind.chunk, config.head_dims(kind)) for kind in kinds
            )
        }
        if longest is None and cache is not None:
            longest = cache.slots
        rotations = {
            rotary: None if rotary is None else rotary.tables(positions, slots=longest)
            for rotary in dict.fromkeys(kind.rotary for kind in kinds)
        }
        temperatures = {
            temperature: None if temperature is None else temperature.factors(positions)
            for temperature in dict.fromkeys(kind.temperature for kind in kinds)
        }
        return {
            kind: Surroundings(
                attend=attends[kind.window, kind.chunk, config.head_dims(kind)],
                rotation=rotations[kind.rotary],
                temperature=temperatures[kind.temperature],
            )
            for kind in kinds
        }

    def head_kernel(self) -> Kernel:
        """Returns the head, [embed, vocab]; if tied, the transposed embedding."""
        if self.config.tie_word_embeddings:
            return getattr(self, self.embedding_name).embedding.get_value().T
        return self.lm_head.kernel.get_value()


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """Returns `x` times a number, in the dtype of `x`, multiplied in float32."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
