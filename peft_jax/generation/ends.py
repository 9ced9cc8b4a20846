"""Finds the end of a continuation: end tokens and stop strings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from peft_jax.models import CausalLM
from peft_jax.runtime.files import read_json_object

_GENERATION_CONFIG = "generation_config.json"

_CONTEXT = 8
"""Number of prompt tokens that are decoded together with a continuation."""


def end_tokens(
    model: CausalLM, *, tokenizer: Any = None, folder: Path | None = None
) -> tuple[int, ...]:
    """Returns all end tokens that a model's files name.

    Args:
      model: Model, whose `config.json` may name end tokens.
      tokenizer: Transformers tokenizer, whose end token is included.
      folder: Checkpoint folder. Its `generation_config.json`, if any, often is the only file with
        the end token of a chat model's turns.

    Returns:
      End tokens in the model's vocabulary, in ascending order.

    Raises:
      ValueError: An `eos_token_id` is neither an integer nor a list of integers, or
        `generation_config.json` is not a JSON object.
    """
    found = set(_as_ids(model.hf_config.get("eos_token_id"), "config.json"))
    if tokenizer is not None:
        found |= set(_as_ids(tokenizer.eos_token_id, "the tokenizer"))
    if folder is not None and (file := folder / _GENERATION_CONFIG).is_file():
        found |= set(_as_ids(read_json_object(file).get("eos_token_id"), str(file)))
    return tuple(sorted(token for token in found if 0 <= token < model.config.vocab_size))


class Continuation:
    """Decodes the continuation of one prompt.

    Args:
      tokenizer: Transformers tokenizer.
      prompt: Tokens of the prompt.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] | np.ndarray):
        self._tokenizer = tokenizer
        self._context = [int(token) for token in prompt[-_CONTEXT:]]

    def text(self, tokens: Int32[np.ndarray, " new"], *, special_tokens: bool = False) -> str:
        """Decodes new tokens in the context of the prompt.

        Decoding depends on position: SentencePiece drops the space before the first word. So the
        tokens are decoded after the prompt's last ones, whose text is removed.

        Args:
          tokens: New tokens, int32 [n].
          special_tokens: Whether to include special tokens such as `</s>`.
        """
        before = self._decode(self._context, special_tokens)
        whole = self._decode([*self._context, *tokens.tolist()], special_tokens)
        if whole.startswith(before):
            return whole[len(before) :]
        # The first new token completes a character that the prompt ends within.
        return self._decode(tokens.tolist(), special_tokens)

    def find(self, strings: Sequence[str], tokens: Int32[np.ndarray, " new"]) -> int | None:
        """Returns the number of tokens that complete the first stop string; None without one.

        Special tokens are included as text, so that they can be stop strings.
        """

        def holds(count: int) -> bool:
            text = self.text(tokens[:count], special_tokens=True)
            return any(string in text for string in strings)

        if not holds(len(tokens)):
            return None
        low, high = 0, len(tokens)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

    def _decode(self, tokens: list[int], special_tokens: bool) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False
        )


def truncate(text: str, strings: Sequence[str]) -> str:
    """Returns the text before the first occurrence of one of the strings.

    Example:
      >>> truncate("4. Question: 5 and", ("Question:", " 5"))
      '4. '
    """
    places = [place for string in strings if (place := text.find(string)) >= 0]
    return text[: min(places, default=len(text))]


def _as_ids(value: Any, where: str) -> tuple[int, ...]:
    """Returns the token ids of a configuration's value: an id, a list of ids, or None."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ValueError(
            f"{where} sets eos_token_id = {value!r}, but it must be an integer or a list of"
            " integers"
        )
    return tuple(ids)
