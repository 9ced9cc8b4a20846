"""Reads the attributes that the `config.json` of most decoders has."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft_jax.models.attributes import given, require
from peft_jax.models.layer_types import LayerType, shortest_cycle
from peft_jax.models.rope import RotarySettings
from peft_jax.models.rope_attributes import ROTARY_ATTRIBUTES

COMMON = ROTARY_ATTRIBUTES | {
    "head_dim",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
}
"""Attributes that `read_sizes` reads, and those of rotary embeddings."""

SILU = {"hidden_act": ("silu", "swish")}
"""The MLP's nonlinearity in most families."""


def read_sizes(
    hf_config: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    norm_epsilon: float = 1e-6,
    tied: bool = False,
) -> dict[str, Any]:
    """Reads the fields of `DecoderConfig` except for the types of layers.

    Args:
      hf_config: The parsed `config.json`.
      head_dim: H where none is given; None for D divided by the number of heads.
      num_kv_heads: Number of key-value heads where none is given; None for that of query heads.
      norm_epsilon: Epsilon of norms where none is given.
      tied: Whether the head is the transposed embedding, where it is not given.

    Raises:
      ValueError: An attribute is missing, or heads do not divide D.
    """
    hidden_size = require(hf_config, "hidden_size")
    num_heads = require(hf_config, "num_attention_heads")
    found = given(hf_config, "head_dim", head_dim)
    if found is None and hidden_size % num_heads:
        raise ValueError(
            f"config.json sets no head_dim, and hidden_size = {hidden_size} is not a multiple of"
            f" num_attention_heads = {num_heads}"
        )
    return {
        "vocab_size": require(hf_config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": require(hf_config, "intermediate_size"),
        "num_layers": require(hf_config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": given(hf_config, "num_key_value_heads", num_kv_heads or num_heads),
        "head_dim": found or hidden_size // num_heads,
        "norm_epsilon": given(hf_config, "rms_norm_eps", norm_epsilon),
        "max_positions": given(hf_config, "max_position_embeddings", 2048),
        "tie_word_embeddings": given(hf_config, "tie_word_embeddings", tied),
        "initializer_range": given(hf_config, "initializer_range", 0.02),
    }


def read_layer_types(
    hf_config: Mapping[str, Any],
    default: Sequence[str],
    *,
    window: int | None,
    rotary: Mapping[str, RotarySettings | None],
) -> tuple[LayerType, ...]:
    """Reads `layer_types`: which layers have a sliding window.

    Args:
      hf_config: The parsed `config.json`.
      default: Type of each layer where the attribute is absent.
      window: Window of the layers "sliding_attention", in tokens.
      rotary: Rotary embedding of "sliding_attention" and of "full_attention", or None.

    Returns:
      The types' shortest cycle.

    Raises:
      ValueError: There are more or fewer types than layers, a type is unknown, or layers slide
        without a window.
    """
    layers = require(hf_config, "num_hidden_layers")
    names = given(hf_config, "layer_types", list(default))
    if len(names) != layers:
        raise ValueError(
            f"config.json sets layer_types of {len(names)} layers, but num_hidden_layers = {layers}"
        )
    kinds = {
        "sliding_attention": LayerType(window=window, rotary=rotary["sliding_attention"]),
        "full_attention": LayerType(rotary=rotary["full_attention"]),
    }
    if unknown := sorted(set(names) - set(kinds)):
        raise ValueError(
            f"config.json sets layer_types with {', '.join(map(repr, unknown))}, but only"
            f" {' and '.join(kinds)} are implemented"
        )
    if window is None and "sliding_attention" in names:
        raise ValueError(
            "config.json sets layer_types with sliding_attention, but sliding_window is null"
        )
    return shortest_cycle([kinds[name] for name in names])
