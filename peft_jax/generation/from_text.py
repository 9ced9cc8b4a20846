"""Generation from text to text, with a transformers tokenizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from peft_jax.core import Tree
from peft_jax.data.encode import Encoder
from peft_jax.data.examples import Conversation, Example, prompt_and_completion
from peft_jax.generation.ends import Continuation, cut_off, end_tokens
from peft_jax.generation.from_tokens import FinishReason, generate
from peft_jax.generation.settings import GenerationSettings
from peft_jax.generation.stats import GenerationStats
from peft_jax.models import CausalLM

Messages = Sequence[Mapping[str, Any]]
"""A conversation as `apply_chat_template` takes it: dictionaries with "role" and "content"."""

Prompt = str | Example | Messages | Conversation
"""A text to be continued; an example of a data set, whose answer is; a conversation, whose next
turn is, after the tokenizer's chat template. A `Conversation` may have tools."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCompletion:
    """What one prompt was continued by.

    Attributes:
      text: the text, without special tokens and without the stop string.
      tokens: int32 [n], its tokens, up to and with the end token or the end of the stop string.
      finish_reason: why it ended.
    """

    text: str
    tokens: Int32[np.ndarray, " new"]
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """What `generate_text` gives.

    Attributes:
      completions: one for each prompt, in their order.
      stats: how much and how fast.
    """

    completions: tuple[TextCompletion, ...]
    stats: GenerationStats

    @property
    def texts(self) -> list[str]:
        """The texts alone."""
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
) -> GeneratedText:
    """Continues texts.

    Prompts are tokenized by the functions that make training's, and so as it shows them to the
    model: behind what the tokenizer puts before a text, and a conversation by its chat template.

    Args:
      model: the model.
      params: its parameters, with adapters bound or merged.
      tokenizer: a transformers tokenizer.
      prompts: the prompts.
      settings: how; by default greedily.
      row_sharding: as for `generate`.
      split_special_tokens: tokenize control tokens in texts, and in messages that are not the
        assistant's, as the characters that they are; as the setting of that name in training's
        data, and right for text of others.

    Raises:
      ValueError: as `generate`; or a conversation and no chat template, or one that refuses it.
      FloatingPointError: as `generate`.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of prompts, but is one text: put it in a list")
    encoder = Encoder(tokenizer, max_length=1, split_special_tokens=split_special_tokens)
    tokens = [encoder.prompt_ids(_as_example(prompt, encoder)) for prompt in prompts]
    return generate_text_from_tokens(
        model, params, tokenizer, tokens, settings, row_sharding=row_sharding
    )


def generate_text_from_tokens(
    model: CausalLM,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    settings: GenerationSettings | None = None,
    *,
    row_sharding: jax.sharding.NamedSharding | None = None,
) -> GeneratedText:
    """Continues prompts that are tokenized already; arguments and errors as for `generate_text`."""
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
    )
    completions = tuple(
        TextCompletion(
            text=cut_off(continuation.text(completion.tokens), strings),
            tokens=completion.tokens,
            finish_reason=completion.finish_reason,
        )
        for continuation, completion in zip(continuations, found.completions, strict=True)
    )
    return GeneratedText(completions=completions, stats=found.stats)


def _as_example(prompt: Prompt, encoder: Encoder) -> Example:
    """The prompt as an example whose answer is still to be written."""
    if isinstance(prompt, Example):
        return prompt
    if isinstance(prompt, str):
        return prompt_and_completion(prompt, "")
    if isinstance(prompt, Conversation):
        return encoder.renderer.prompt(prompt.messages, prompt.tools)
    return encoder.renderer.prompt(prompt)
