"""Generates text with a key-value cache.

- [`from_text`][peft_jax.generation.from_text]: `generate_text`, from texts, conversations or
  examples to texts; `generate_text_from_tokens`.
- [`from_tokens`][peft_jax.generation.from_tokens]: `generate`, from tokens to tokens.
- [`loading`][peft_jax.generation.loading]: `load_for_generation`, from a checkpoint and an
  adapter's folder.
- [`command`][peft_jax.generation.command]: `python -m peft_jax.generation`.
- [`ends`][peft_jax.generation.ends]: `end_tokens`, tokens that end a text.
- [`settings`][peft_jax.generation.settings]: `GenerationSettings`.
- [`stats`][peft_jax.generation.stats]: `GenerationStats`.
"""

from peft_jax.generation.ends import end_tokens
from peft_jax.generation.from_text import (
    GeneratedText,
    TextCompletion,
    generate_text,
    generate_text_from_tokens,
)
from peft_jax.generation.from_tokens import Completion, Generated, generate
from peft_jax.generation.loading import Loaded, load_for_generation
from peft_jax.generation.settings import GenerationSettings
from peft_jax.generation.stats import GenerationStats

__all__ = [
    "Completion",
    "Generated",
    "GeneratedText",
    "GenerationSettings",
    "GenerationStats",
    "Loaded",
    "TextCompletion",
    "end_tokens",
    "generate",
    "generate_text",
    "generate_text_from_tokens",
    "load_for_generation",
]
