"""Hugging Face's `config.json`, read strictly: what is not understood is refused by name.

A configuration attribute that is silently ignored is a model that silently computes something
else. So each family lists the attributes it reads, those known not to change the logits, and those
that are implemented at one value only; anything else is an error.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.core import did_you_mean

_IRRELEVANT = frozenset(
    {
        # Provenance and storage.
        "architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype",
        "transformers_version", "unsloth_fixed", "unsloth_version",
        # Tokens and how text is generated; what transformers used to write for every model.
        "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
        "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "id2label", "label2id", "length_penalty", "max_length",
        "max_sequence_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_labels", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
        "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
        "sep_token_id", "seq_length", "suppress_tokens", "task_specific_params", "temperature",
        "tokenizer_class", "top_k", "top_p", "typical_p", "unk_token_id", "use_cache",
        # How other frameworks compute the same function.
        "attn_implementation", "gradient_checkpointing", "pretraining_tp", "tf_legacy_loss",
        "torchscript", "transformers.js_config", "use_bfloat16",
    }
)  # fmt: skip

_FIXED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_dropout": (0.0,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
}

MOST_LAYERS = 10_000
"""Far more than any model has; work and names that grow with the layers stay small."""

_LARGEST_SIZE = 2**31 - 1


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


Kind = tuple[str, Callable[[Any], bool]]
"""What a value has to be, in words and as a test."""

_LAYERS: Kind = (
    f"a whole number from 1 to {MOST_LAYERS:,}",
    lambda value: _is_integer(value) and 1 <= value <= MOST_LAYERS,
)
_SIZE: Kind = (
    "a whole number from 1 to 2³¹ - 1",
    lambda value: _is_integer(value) and 1 <= value <= _LARGEST_SIZE,
)
_INTEGER: Kind = (
    "a whole number below 2³¹",
    lambda value: _is_integer(value) and abs(value) <= _LARGEST_SIZE,
)
_POSITIVE: Kind = ("a finite number above 0", lambda value: _is_finite(value) and value > 0)
_NOT_NEGATIVE: Kind = ("a finite number of at least 0", lambda v: _is_finite(v) and v >= 0)
_BOOL: Kind = ("true or false", lambda value: isinstance(value, bool))
_TEXT: Kind = ("a text", lambda value: isinstance(value, str))
_TEXTS: Kind = ("a list of texts", _are_strings)
_TOKENS: Kind = (
    "the number of a token, or a list of numbers",
    lambda value: all(map(_is_integer, value if isinstance(value, list) else [value])),
)
_OBJECT: Kind = ("an object", lambda value: isinstance(value, Mapping))

_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), _LAYERS),
    **dict.fromkeys(
        (
            "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "n_embed",
            "n_head", "n_inner", "num_attention_heads", "num_key_value_heads", "num_labels",
            "original_max_position_embeddings", "type_vocab_size", "vocab_size",
        ),
        _SIZE,
    ),
    **dict.fromkeys(("max_window_layers", "pad_token_id", "sliding_window"), _INTEGER),
    **dict.fromkeys(
        (
            "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor",
            "layer_norm_eps", "layer_norm_epsilon", "low_freq_factor", "partial_rotary_factor",
            "rms_norm_eps", "rope_theta",
        ),
        _POSITIVE,
    ),
    "initializer_range": _NOT_NEGATIVE,
    **dict.fromkeys(
        (
            "apply_residual_connection_post_layernorm", "attention_bias", "mlp_bias",
            "tie_word_embeddings", "truncate", "use_sliding_window",
        ),
        _BOOL,
    ),
    # Read by transformers, with the tokenizer, and by generation.
    **dict.fromkeys(("bos_token_id", "eos_token_id"), _TOKENS),
    **dict.fromkeys(("dtype", "torch_dtype"), _TEXT),
    **dict.fromkeys(("hidden_act", "model_type", "problem_type", "rope_type", "type"), _TEXT),
    **dict.fromkeys(("architectures", "layer_types"), _TEXTS),
    **dict.fromkeys(("id2label", "rope_parameters", "rope_scaling"), _OBJECT),
}  # fmt: skip
"""What attributes have to be, whatever the family."""


def check_kind(hf_config: Mapping[str, Any], name: str, *, where: str = "config.json sets") -> None:
    """Checks the type and the range of one attribute, before anything is computed from it.

    Args:
      hf_config: the attributes.
      name: which of them.
      where: how a message begins.

    Raises:
      ValueError: the value is not null and not what the attribute has to be.

    Example:
      >>> check_kind({"num_attention_heads": 0}, "num_attention_heads")
      Traceback (most recent call last):
      ValueError: config.json sets num_attention_heads = 0; it must be a whole number from 1 to
      2³¹ - 1
    """
    value = hf_config.get(name)
    if value is None or name not in _KINDS:
        return
    wanted, fits = _KINDS[name]
    if not fits(value):
        raise ValueError(f"{where} {name} = {_shown(value)}; it must be {wanted}")


def _shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    if _is_integer(value) and abs(value) >= 10**40:
        return "an integer of more than 40 digits"  # some are too long to be written out
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeTable:
    """What one family makes of the attributes of `config.json`.

    Attributes:
      family: the family's `model_type`.
      architectures: class names that may stand under "architectures".
      read: attributes the family's configuration is built from.
      irrelevant: attributes that do not change the logits, besides those common to all families.
      fixed: attributes implemented at the given values only.
    """

    family: str
    architectures: frozenset[str]
    read: frozenset[str]
    irrelevant: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def check(self, hf_config: Mapping[str, Any]) -> None:
        """Raises ValueError for the first attribute that would change the computation unseen.

        Attributes that are null, or private (a leading underscore), say nothing and pass. The
        others are checked by type and range too, where these are known.
        """
        for name in hf_config:
            check_kind(hf_config, name)
        self._check_architectures(hf_config.get("architectures"))
        fixed = {**_FIXED, **self.fixed}
        for name, value in hf_config.items():
            if value is None or name.startswith("_"):
                continue
            if name in self.read or name in self.irrelevant or name in _IRRELEVANT:
                continue
            if name not in fixed:
                raise ValueError(
                    f"config.json sets {name} = {_shown(value)}, which is not understood for"
                    f" {self.family!r} models and may change what they compute"
                    f"{did_you_mean(name, self.read | set(fixed))}"
                )
            if value not in fixed[name]:
                works = " or ".join(repr(v) for v in fixed[name])
                raise ValueError(
                    f"config.json sets {name} = {_shown(value)}; {self.family!r} models are"
                    f" implemented for {name} = {works} only"
                )

    def _check_architectures(self, architectures: list[str] | None) -> None:
        for name in architectures or ():
            if name not in self.architectures:
                raise ValueError(
                    f"config.json names the architecture {name!r}, which is not implemented for"
                    f" {self.family!r} models{did_you_mean(name, self.architectures)}"
                )


def require(hf_config: Mapping[str, Any], name: str) -> Any:
    """The value of an attribute that has no safe default.

    Raises:
      ValueError: it is absent or null.
    """
    value = hf_config.get(name)
    if value is None:
        raise ValueError(f"config.json lacks {name}, without which the model cannot be built")
    return value


def given(hf_config: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of an attribute, or transformers' default where it is absent or null."""
    value = hf_config.get(name)
    if value is None:
        return default
    # JSON may write a number without its point.
    return float(value) if isinstance(default, float) and isinstance(value, int) else value
