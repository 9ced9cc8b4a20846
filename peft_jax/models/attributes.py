"""Hugging Face's `config.json`, read strictly: what is not understood is refused by name.

A configuration attribute that is silently ignored is a model that silently computes something
else. So each family lists the attributes it reads, those known not to change the logits, and those
that are implemented at one value only; anything else is an error.
"""

import dataclasses
from collections.abc import Mapping
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

        Attributes that are null, or private (a leading underscore), say nothing and pass.
        """
        self._check_architectures(hf_config.get("architectures"))
        fixed = {**_FIXED, **self.fixed}
        for name, value in hf_config.items():
            if value is None or name.startswith("_"):
                continue
            if name in self.read or name in self.irrelevant or name in _IRRELEVANT:
                continue
            if name not in fixed:
                raise ValueError(
                    f"config.json sets {name} = {value!r}, which is not understood for"
                    f" {self.family!r} models and may change what they compute"
                    f"{did_you_mean(name, self.read | set(fixed))}"
                )
            if value not in fixed[name]:
                works = " or ".join(repr(v) for v in fixed[name])
                raise ValueError(
                    f"config.json sets {name} = {value!r}; {self.family!r} models are implemented"
                    f" for {name} = {works} only"
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
    return default if value is None else value
