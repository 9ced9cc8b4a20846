"""Where a continuation ends: end tokens by number, stop strings in the text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from peft_jax.models import CausalLM
from peft_jax.runtime.files import read_json_object

_GENERATION_CONFIG = "generation_config.json"

_CONTEXT = 8
"""How many tokens of the prompt a continuation is decoded behind."""


def end_tokens(
    model: CausalLM, *, tokenizer: Any = None, folder: Path | None = None
) -> tuple[int, ...]:
    """The tokens that end a text, as everything that is there names them.

    Args:
      model: its `config.json`.
      tokenizer: a transformers tokenizer, with its end token.
      folder: a checkpoint's folder, with its `generation_config.json` if there is one: what a
        chat model's turns end with often stands there alone.

    Returns:
      Those that the model has, rising.

    Raises:
      ValueError: an `eos_token_id` is no number of a token and no list of them, or
        `generation_config.json` is no JSON object.
    """
    found = set(_as_ids(model.hf_config.get("eos_token_id"), "config.json"))
    if tokenizer is not None:
        found |= set(_as_ids(tokenizer.eos_token_id, "the tokenizer"))
    if folder is not None and (file := folder / _GENERATION_CONFIG).is_file():
        found |= set(_as_ids(read_json_object(file).get("eos_token_id"), str(file)))
    return tuple(sorted(token for token in found if 0 <= token < model.config.vocab_size))


class Continuation:
    """What follows one prompt, as text.

    Args:
      tokenizer: a transformers tokenizer.
      prompt: the prompt's tokens.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] | np.ndarray):
        self._tokenizer = tokenizer
        self._context = [int(token) for token in prompt[-_CONTEXT:]]

    def text(self, tokens: Int32[np.ndarray, " new"], *, special_tokens: bool = False) -> str:
        """The text of new tokens as they follow the prompt.

        A text begins otherwise than it goes on (SentencePiece drops the space before its first
        word), so the tokens are decoded behind the prompt's last ones, whose text is then removed.

        Args:
          tokens: int32 [n], the new tokens.
          special_tokens: whether special tokens (`</s>`) are written out or left out.
        """
        before = self._decode(self._context, special_tokens)
        whole = self._decode([*self._context, *tokens.tolist()], special_tokens)
        if whole.startswith(before):
            return whole[len(before) :]
        # The first new token completes a character that the prompt broke off.
        return self._decode(tokens.tolist(), special_tokens)

    def find(self, strings: Sequence[str], tokens: Int32[np.ndarray, " new"]) -> int | None:
        """How many of the tokens there are when the first of the strings is complete, or None.

        Special tokens count as their text, so that they can be stopped at by name.
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


def cut_off(text: str, strings: Sequence[str]) -> str:
    """The text before the first place where one of the strings stands.

    Example:
      >>> cut_off("4. Question: 5 and", ("Question:", " 5"))
      '4. '
    """
    places = [place for string in strings if (place := text.find(string)) >= 0]
    return text[: min(places, default=len(text))]


def _as_ids(value: Any, where: str) -> tuple[int, ...]:
    """Token numbers as configurations give them: one, a list of them, or nothing."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ValueError(
            f"{where} sets eos_token_id = {value!r}; it must be the number of a token, or a list of"
            " numbers"
        )
    return tuple(ids)
