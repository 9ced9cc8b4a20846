"""How text is generated: how much, how tokens are chosen, and where to stop."""

import dataclasses
from collections.abc import Sequence

from peft_jax.core.validation import check_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Choices for one call of `generate` or `generate_text`.

    Changing them compiles nothing anew, but for a temperature of 0 or not, and for `max_new_tokens`
    and `batch_size` where they reach another bucket.

    Attributes:
      max_new_tokens: the most tokens a prompt is continued by; fewer where the model's context
        ends before.
      temperature: what logits are divided by before sampling; 0 takes the likeliest token.
      top_k: sample among this many likeliest tokens; None among all.
      top_p: sample among the fewest likeliest tokens that have at least this probability together,
        of what `top_k` has left; 1 among all (Holtzman et al., 2019, arXiv 1904.09751).
      seed: of sampling. What a prompt is continued by depends on the seed, the prompt, and how
        often the same prompt stands before it; not on its place or on the other prompts.
      eos_ids: the tokens that end a continuation, which stay its last. None takes those of the
        model's `config.json` (with `generate_text`, the tokenizer's too); () never ends one.
      stop_strings: texts that end a continuation, and are cut off it; for `generate_text`.
      batch_size: how many prompts are continued at a time. More are sorted by length and cut.

    Raises:
      ValueError: a value that cannot be; it is named.

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
            raise ValueError(f"temperature must be at least 0, but is {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, but is {self.top_p!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, but is {self.seed!r}")
        if isinstance(self.stop_strings, str):
            raise ValueError(
                f"stop_strings must be several texts, but is the text {self.stop_strings!r}"
            )
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty text, which would stop at once")
        if self.eos_ids is not None:
            if isinstance(self.eos_ids, int):
                raise ValueError(
                    f"eos_ids must be several tokens, but is the number {self.eos_ids}"
                )
            object.__setattr__(self, "eos_ids", tuple(int(token) for token in self.eos_ids))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
