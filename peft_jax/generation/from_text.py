"""Continues texts with a transformers tokenizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from peft_jax.adapters import StackedAdapters
from peft_jax.core import Tree
from peft_jax.data.encode import Encoder
from peft_jax.data.examples import Conversation, Example, prompt_and_completion
from peft_jax.generation.ends import Continuation, end_tokens, truncate
from peft_jax.generation.from_tokens import FinishReason, generate
from peft_jax.generation.settings import GenerationSettings
from peft_jax.generation.stats import GenerationStats
from peft_jax.models import CausalLM

Messages = Sequence[Mapping[str, Any]]
"""Conversation in the form of `apply_chat_template`: dictionaries with "role" and "content"."""

Prompt = str | Example | Messages | Conversation
"""A text to continue, an example to answer, or a conversation whose next turn to generate.

Conversations use the tokenizer's chat template. A `Conversation` may have tools.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCompletion:
    """Continuation of one prompt.

    Attributes:
      text: Text without special tokens and stop string.
      tokens: Tokens up to and including the end token or stop string, int32 [n].
      finish_reason: Reason for its end.
    """

    text: str
    tokens: Int32[np.ndarray, " new"]
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """Result of `generate_text`.

    Attributes:
      completions: Continuations, in the order of the prompts.
      stats: Counts and seconds.
    """

    completions: tuple[TextCompletion, ...]
    stats: GenerationStats

    @property
    def texts(self) -> list[str]:
        """Texts of the continuations."""
        return [completion.text for completion in self.completions]


def generate_text(
    model: CausalLM,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | None = None,
    *,
    row_sharding: jax.sharding.NamedSharding | None = None,
    split_special_tokens: bool = False,
    adapters: StackedAdapters | None = None,
    row_adapters: Sequence[str | None] = (),
) -> GeneratedText:
    """Continues texts, examples or conversations.

    Prompts are tokenized as in training: with the tokenizer's initial tokens, and conversations
    with its chat template.

    Args:
      model: Model.
      params: Parameters of the model, with adapters bound or merged.
      tokenizer: Transformers tokenizer.
      prompts: Prompts.
      settings: Generation settings. Default: greedy decoding.
      row_sharding: See `generate`.
      split_special_tokens: Tokenize control tokens as plain text in texts, and in messages that are
        not the assistant's. Use it for untrusted text. The training data has the same setting.
      adapters: See `generate`.
      row_adapters: See `generate`.

    Raises:
      ValueError: `generate` rejects an argument, there is no chat template for a conversation, or
        the template rejects it.
      FloatingPointError: The logits are not finite.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of prompts, but is one text; put it in a list")
    encoder = Encoder(tokenizer, max_length=1, split_special_tokens=split_special_tokens)
    tokens = [encoder.prompt_ids(_as_example(prompt, encoder)) for prompt in prompts]
    return generate_text_from_tokens(
        model,
        params,
        tokenizer,
        tokens,
        settings,
        row_sharding=row_sharding,
        adapters=adapters,
        row_adapters=row_adapters,
    )


def generate_text_from_tokens(
    model: CausalLM,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    settings: GenerationSettings | None = None,
    *,
    row_sharding: jax.sharding.NamedSharding | None = None,
    adapters: StackedAdapters | None = None,
    row_adapters: Sequence[str | None] = (),
) -> GeneratedText:
    """Continues tokenized prompts; see `generate_text` for arguments and errors."""
    settings = settings or GenerationSettings()
    if settings.eos_ids is None:
        settings = dataclasses.replace(settings, eos_ids=end_tokens(model, tokenizer=tokenizer))
    continuations = [Continuation(tokenizer, ids) for ids in prompts]
    strings = settings.stop_strings

    def find_stop(index: int, new: Int32[np.ndarray, " new"]) -> int | None:
        return continuations[index].find(strings, new)

    found = generate(
        model,
        params,
        prompts,
        settings,
        find_stop=find_stop if strings else None,
        row_sharding=row_sharding,
        adapters=adapters,
        row_adapters=row_adapters,
    )
    completions = tuple(
        TextCompletion(
            text=truncate(continuation.text(completion.tokens), strings),
            tokens=completion.tokens,
            finish_reason=completion.finish_reason,
        )
        for continuation, completion in zip(continuations, found.completions, strict=True)
    )
    return GeneratedText(completions=completions, stats=found.stats)


def _as_example(prompt: Prompt, encoder: Encoder) -> Example:
    """Returns the prompt as an example without an answer."""
    if isinstance(prompt, Example):
        return prompt
    if isinstance(prompt, str):
        return prompt_and_completion(prompt, "")
    if isinstance(prompt, Conversation):
        return encoder.renderer.prompt(prompt.messages, prompt.tools)
    return encoder.renderer.prompt(prompt)
