"""Encodes labeled texts or pairs of texts as rows for an encoder."""

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.batch import LabeledBatch
from peft_jax.data.encode import TOO_LONG
from peft_jax.data.examples import Conversation, Example
from peft_jax.data.settings import DataSettings

_PROMPT_SETTINGS = (
    "chat",
    "chat_template",
    "system_prompt",
    "split_special_tokens",
    "prompt_template",
    "completion_template",
    "completion_only",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedText:
    """An encoded text or pair of texts.

    Attributes:
      ids: Int32 [n], tokens.
      token_types: Int32 [n], token types.
      label: Index of the label or, in a regression, the target number.
      truncated: Number of tokens that were truncated.
    """

    ids: np.ndarray
    token_types: np.ndarray
    label: float
    truncated: int = 0

    @property
    def positions(self) -> int:
        """Number of positions that it takes."""
        return len(self.ids)


class LabeledEncoder:
    """Encodes examples with sentences and a label as rows.

    The tokenizer adds its special tokens around and between the texts ([CLS] and [SEP] for BERT)
    and assigns token types. A pair that is too long is truncated at its longer text.

    Attributes:
      tokenizer: The transformers tokenizer.
      max_length: T, largest number of tokens per row, including special tokens.
      pad_id: Padding token; nothing attends to it.
    """

    def __init__(self, tokenizer: Any, settings: DataSettings, *, max_length: int):
        """Checks that the settings apply to rows without a prompt.

        Args:
          tokenizer: A transformers tokenizer.
          settings: Data settings.
          max_length: T.

        Raises:
          ValueError: A setting for prompts is set, or `data.too_long` is "split".
        """
        for name in _PROMPT_SETTINGS:
            if getattr(settings, name):
                raise ValueError(
                    f"data.{name} is {getattr(settings, name)!r}, but must be unset for an encoder,"
                    " which reads a row's texts without a prompt"
                )
        if settings.too_long == "split":
            raise ValueError(
                "data.too_long is 'split', but a row with one label cannot be split; use"
                " 'truncate', 'skip' or 'error'"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_id: int = tokenizer.pad_token_id or 0
        self._truncates = settings.too_long in (None, "truncate")

    def as_example(self, example: Example | Conversation) -> Example:
        """Returns the example unchanged.

        Raises:
          BadRowError: It is a conversation.
        """
        if isinstance(example, Conversation):
            raise BadRowError("wrong type", "an encoder reads texts, not conversations")
        return example

    def encode(self, example: Example | Conversation) -> list[EncodedText]:
        """Encodes an example as one sequence.

        Raises:
          BadRowError: It has no sentences or no label, or is too long and must not be truncated.
        """
        example = self.as_example(example)
        label = example.label if example.value is None else example.value
        if not example.sentences or label is None:
            raise BadRowError("no label", "the row has no sentences with a label or number")
        encoded = self.tokenizer(
            *example.sentences,
            truncation="longest_first" if self._truncates else False,
            max_length=self.max_length if self._truncates else None,
            # Tokenizers without token types (RoBERTa's) return none, which means zeros.
            return_token_type_ids="token_type_ids" in self.tokenizer.model_input_names,
        )
        ids = np.array(encoded["input_ids"], np.int32)
        if len(ids) > self.max_length:
            detail = f"{len(ids)} tokens, but at most {self.max_length} fit"
            raise BadRowError(TOO_LONG, detail, tokens=len(ids))
        truncated = 0
        if self._truncates and len(ids) == self.max_length:
            whole = self.tokenizer(*example.sentences, truncation=False, verbose=False)
            truncated = len(whole["input_ids"]) - len(ids)
        types = np.array(encoded.get("token_type_ids", np.zeros_like(ids)), np.int32)
        return [EncodedText(ids=ids, token_types=types, label=float(label), truncated=truncated)]

    def lost_characters(self, example: Example | Conversation) -> set[str]:
        """Returns the characters lost by tokenization, except white space, case and accents."""
        text = " ".join(self.as_example(example).sentences)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return _letters(text) - _letters(self.tokenizer.decode(ids))

    def fill_row(self, texts: Sequence[EncodedText]) -> LabeledBatch:
        """Builds one row, fields [T] and []; without a text, a row of padding."""
        tokens = np.full(self.max_length, self.pad_id, np.int32)
        types, segments = np.zeros((2, self.max_length), np.int32)
        for text in texts:
            tokens[: len(text.ids)] = text.ids
            types[: len(text.ids)] = text.token_types
            segments[: len(text.ids)] = 1
        return LabeledBatch(
            tokens=tokens,
            token_types=types,
            segment_ids=segments,
            labels=np.float32(texts[0].label if texts else 0.0),
            loss_mask=np.float32(len(texts)),
        )


def _letters(text: str) -> set[str]:
    """Returns the characters of a text, without case, accents and white space."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return {c for c in plain if not c.isspace() and not unicodedata.combining(c)}
