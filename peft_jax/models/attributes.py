"""Checks a Hugging Face `config.json` strictly: an unknown attribute is an error.

If an attribute were ignored, the model could silently compute something else. So each family lists
the attributes it reads, those known not to change the logits, and those implemented for some values
only. Any other attribute raises ValueError.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.core import did_you_mean
from peft_jax.models.packed_kernels import read_packing

_IRRELEVANT = frozenset(
    {
        # Provenance and storage.
        "architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype",
        "transformers_version", "unsloth_fixed", "unsloth_version",
        # Tokens and generation settings, including those old transformers wrote for every model.
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

MAX_LAYERS = 10_000
"""Upper bound on a model's layers, far above any real model; it bounds the work per file."""

_MAX_SIZE = 2**31 - 1


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


Kind = tuple[str, Callable[[Any], bool]]
"""A description of the values an attribute accepts, and a predicate for them."""

_LAYERS: Kind = (
    f"a whole number from 1 to {MAX_LAYERS:,}",
    lambda value: _is_integer(value) and 1 <= value <= MAX_LAYERS,
)
_SIZE: Kind = (
    "a whole number from 1 to 2³¹ - 1",
    lambda value: _is_integer(value) and 1 <= value <= _MAX_SIZE,
)
_COUNT: Kind = (
    "a whole number from 0 to 2³¹ - 1",
    lambda value: _is_integer(value) and 0 <= value <= _MAX_SIZE,
)
_INTEGER: Kind = (
    "a whole number below 2³¹",
    lambda value: _is_integer(value) and abs(value) <= _MAX_SIZE,
)
_POSITIVE: Kind = ("a finite number above 0", lambda value: _is_finite(value) and value > 0)
_FACTORS: Kind = (
    "a list of finite numbers above 0",
    lambda value: isinstance(value, list) and all(_is_finite(v) and v > 0 for v in value),
)
_NUMBERS: Kind = (
    "a list of whole numbers from 0 to 2³¹ - 1",
    lambda value: (
        isinstance(value, list) and all(_is_integer(v) and 0 <= v <= _MAX_SIZE for v in value)
    ),
)
_FLAGS: Kind = (
    "a list of 0 and 1",
    lambda value: isinstance(value, list) and all(_is_integer(v) and v in (0, 1) for v in value),
)
_NOT_NEGATIVE: Kind = ("a finite number of at least 0", lambda v: _is_finite(v) and v >= 0)
_BOOL: Kind = ("true or false", lambda value: isinstance(value, bool))
_TEXT: Kind = ("a string", lambda value: isinstance(value, str))
_TEXTS: Kind = ("a list of strings", _are_strings)
_WORDS: Kind = (
    "a string, or a list of strings",
    lambda value: isinstance(value, str) or _are_strings(value),
)
_TOKENS: Kind = (
    "a token id, or a list of token ids",
    lambda value: all(map(_is_integer, value if isinstance(value, list) else [value])),
)
_OBJECT: Kind = ("an object", lambda value: isinstance(value, Mapping))

_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), _LAYERS),
    **dict.fromkeys(
        (
            "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "n_embed",
            "n_embd", "n_head", "n_inner", "n_positions", "no_rope_layer_interval",
            "num_attention_heads", "num_key_value_heads", "num_labels",
            "original_max_position_embeddings", "sliding_window_pattern", "vocab_size",
            # Experts and latent attention.
            "attention_chunk_size", "decoder_sparse_step", "floor_scale", "intermediate_size_mlp",
            "interleave_moe_layer_step", "kv_lora_rank", "moe_intermediate_size", "n_group",
            "n_routed_experts", "n_shared_experts", "num_experts", "num_experts_per_tok",
            "num_local_experts", "q_lora_rank", "qk_head_dim", "qk_nope_head_dim",
            "qk_rope_head_dim", "topk_group", "shared_expert_intermediate_size", "v_head_dim",
            # Encoders.
            "attention_head_size", "dim", "embedding_size", "global_attn_every_n_layers",
            "hidden_dim", "local_attention", "n_heads", "pooler_hidden_size",
        ),
        _SIZE,
    ),
    **dict.fromkeys(
        (
            "max_relative_positions", "max_window_layers", "pad_token_id", "position_buckets",
            "sliding_window",
        ),
        _INTEGER,
    ),
    **dict.fromkeys(
        (
            "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor",
            "layer_norm_eps", "layer_norm_epsilon", "low_freq_factor", "partial_rotary_factor",
            "attention_multiplier", "attn_logit_softcapping", "attn_scale", "embedding_multiplier",
            "final_logit_softcapping", "logit_scale", "logits_scaling", "mscale", "mscale_all_dim",
            "query_pre_attn_scalar", "residual_multiplier", "rms_norm_eps", "rope_local_base_freq",
            "rope_theta", "rotary_emb_base", "rotary_pct", "routed_scaling_factor", "swiglu_alpha",
            "swiglu_limit",
            # Encoders.
            "global_rope_theta", "local_rope_theta", "norm_eps",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("long_factor", "short_factor"), _FACTORS),
    "initializer_range": _NOT_NEGATIVE,
    **dict.fromkeys(("first_k_dense_replace", "type_vocab_size"), _COUNT),
    **dict.fromkeys(
        (
            "apply_residual_connection_post_layernorm", "attention_bias", "mlp_bias",
            "norm_topk_prob", "position_biased_input", "qkv_bias", "relative_attention",
            "rope_interleave", "scale_attn_weights", "share_att_key", "tie_word_embeddings",
            "truncate", "use_parallel_residual", "use_qk_norm", "use_sliding_window",
            # Encoders.
            "classifier_bias", "norm_bias",
        ),
        _BOOL,
    ),
    # Read by transformers along with the tokenizer, and by generation.
    **dict.fromkeys(("bos_token_id", "eos_token_id"), _TOKENS),
    **dict.fromkeys(("dtype", "torch_dtype"), _TEXT),
    **dict.fromkeys(
        (
            "activation", "activation_function", "hidden_act", "hidden_activation", "model_type",
            "norm_rel_ebd", "pooler_hidden_act", "problem_type", "rope_type", "type",
            # Encoders.
            "classifier_activation", "classifier_pooling",
        ),
        _TEXT,
    ),
    **dict.fromkeys(("architectures", "layer_types"), _TEXTS),
    **dict.fromkeys(("mlp_only_layers", "moe_layers"), _NUMBERS),
    "no_rope_layers": _FLAGS,
    "pos_att_type": _WORDS,
    **dict.fromkeys(
        ("id2label", "quantization_config", "rope_parameters", "rope_scaling", "text_config"),
        _OBJECT,
    ),
}  # fmt: skip
"""Accepted values of attributes, for all families."""


def check_kind(hf_config: Mapping[str, Any], name: str, *, where: str = "config.json sets") -> None:
    """Checks the type and the range of one attribute.

    Args:
      hf_config: Attributes by name.
      name: Name of the attribute.
      where: Beginning of the error message.

    Raises:
      ValueError: The value is neither null nor of the required type and range.

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
    """Returns the representation of a value for a message, shortened to 80 characters."""
    if _is_integer(value) and abs(value) >= 10**40:
        # Python raises for an integer of more than 4300 digits.
        return "an integer of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeTable:
    """Lists the attributes of `config.json` that one family accepts.

    Attributes:
      family: The family's `model_type`.
      architectures: Class names accepted under "architectures".
      read: Attributes that the family's configuration is built from.
      irrelevant: Attributes that do not change the logits, besides those common to all families.
      fixed: Attributes implemented for the listed values only.
      unpacks: Whether packed kernels are read; see `peft_jax.models.packed_kernels`.
    """

    family: str
    architectures: frozenset[str]
    read: frozenset[str]
    irrelevant: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    unpacks: bool = False

    def check(self, hf_config: Mapping[str, Any]) -> None:
        """Raises ValueError for the first attribute that could silently change the computation.

        Null and private attributes (with a leading underscore) are accepted. The others are also
        checked for type and range, where these are known.

        Args:
          hf_config: The parsed `config.json`.

        Raises:
          ValueError: An attribute is unknown, or its value is not implemented.
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
            if name == "quantization_config" and self.unpacks:
                read_packing(value)
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
    """Returns the value of an attribute that has no safe default.

    Raises:
      ValueError: The attribute is absent or null.
    """
    value = hf_config.get(name)
    if value is None:
        raise ValueError(f"config.json lacks {name}, without which the model cannot be built")
    return value


def given(hf_config: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of an attribute, or `default` where it is absent or null."""
    value = hf_config.get(name)
    if value is None:
        return default
    # JSON may write a float without a decimal point.
    return float(value) if isinstance(default, float) and isinstance(value, int) else value
