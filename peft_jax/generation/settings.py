"""Defines the settings of generation."""

import dataclasses
from collections.abc import Sequence

from peft_jax.core.validation import check_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of one call of `generate` or `generate_text`.

    A change only compiles a new program if the temperature changes from or to 0, or if
    `max_new_tokens` or `batch_size` reach another bucket.

    Attributes:
      max_new_tokens: Maximum number of new tokens of a prompt; the model's context may end earlier.
      temperature: Divisor of logits before sampling; 0 decodes greedily.
      top_k: Number of likeliest tokens to sample from; None for all.
      top_p: Sample from the fewest likeliest tokens that reach this probability, after `top_k`; 1
        for all (Holtzman et al., 2019, arXiv 1904.09751).
      seed: Seed of sampling. A continuation depends on the seed, the prompt and the number of equal
        prompts before it, but not on its position or on other prompts.
      eos_ids: End tokens, which are kept as a continuation's last token. None: those of the model's
        `config.json` and, with `generate_text`, of the tokenizer. (): none.
      stop_strings: Texts that end a continuation and are removed from it; for `generate_text`.
      batch_size: Number of prompts in a batch. Prompts are sorted by length.

    Raises:
      ValueError: A value is invalid; the message names the setting.

    Example:
      >>> GenerationSettings(temperature=0.7, top_p=0.95).greedy
      False
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    eos_ids: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_positive_int("max_new_tokens", self.max_new_tokens)
        check_positive_int("batch_size", self.batch_size)
        if self.top_k is not None:
            check_positive_int("top_k", self.top_k)
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be finite and at least 0, but is {self.temperature!r}"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, but is {self.top_p!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, but is {self.seed!r}")
        if isinstance(self.stop_strings, str):
            raise ValueError(
                f"stop_strings must be a list of texts, but is the text {self.stop_strings!r}"
            )
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        if "" in self.stop_strings:
            raise ValueError("stop_strings has an empty text, which would stop at once")
        if self.eos_ids is not None:
            if isinstance(self.eos_ids, int):
                raise ValueError(
                    f"eos_ids must be a list of tokens, but is the number {self.eos_ids}"
                )
            object.__setattr__(self, "eos_ids", tuple(int(token) for token in self.eos_ids))

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature == 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
