"""Texts, or pairs of texts, with a label, to rows for an encoder."""

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

_OF_PROMPTS = (
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
    """One text, or pair, as an encoder reads it.

    Attributes:
      ids: int32 [n].
      token_types: int32 [n].
      label: the label's number, or the number that is to be learned.
      cut: Number of tokens that were cut off because they did not fit.
    """

    ids: np.ndarray
    token_types: np.ndarray
    label: float
    cut: int = 0

    @property
    def positions(self) -> int:
        """How many positions it takes."""
        return len(self.ids)


class LabeledEncoder:
    """Makes rows of examples that have sentences and a label.

    The tokenizer puts its own tokens around a text and between the texts of a pair ([CLS] and [SEP]
    for BERT) and numbers the two. Of a pair that is too long, tokens are cut from the longer of the
    two, as is usual.

    Attributes:
      tokenizer: the transformers tokenizer.
      max_length: T, the most tokens of a row, the tokenizer's own included.
      pad_id: what fills the rest of a row; nothing attends to it.
    """

    def __init__(self, tokenizer: Any, settings: DataSettings, *, max_length: int):
        """Checks that the settings can hold for rows without a prompt.

        Raises:
          ValueError: a setting of prompts is given, or long rows are to be split.
        """
        for name in _OF_PROMPTS:
            if getattr(settings, name):
                raise ValueError(
                    f"data.{name} is {getattr(settings, name)!r}, but an encoder reads a row's"
                    " texts as they are, without a prompt"
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
        """The example itself.

        Raises:
          BadRowError: it is a conversation.
        """
        if isinstance(example, Conversation):
            raise BadRowError("wrong type", "an encoder reads texts, and this is a conversation")
        return example

    def encode(self, example: Example | Conversation) -> list[EncodedText]:
        """The example as one row.

        Raises:
          BadRowError: it has no sentences or no label, or is too long and not to be truncated.
        """
        example = self.as_example(example)
        label = example.label if example.value is None else example.value
        if not example.sentences or label is None:
            raise BadRowError("no label", "the row has no sentences with a label or number")
        encoded = self.tokenizer(
            *example.sentences,
            truncation="longest_first" if self._truncates else False,
            max_length=self.max_length if self._truncates else None,
            # A tokenizer that numbers no texts (RoBERTa's) says nothing, which stands for zeros.
            return_token_type_ids="token_type_ids" in self.tokenizer.model_input_names,
        )
        ids = np.array(encoded["input_ids"], np.int32)
        if len(ids) > self.max_length:
            detail = f"{len(ids)} tokens, and at most {self.max_length} fit"
            raise BadRowError(TOO_LONG, detail, tokens=len(ids))
        cut = 0
        if self._truncates and len(ids) == self.max_length:
            whole = self.tokenizer(*example.sentences, truncation=False, verbose=False)
            cut = len(whole["input_ids"]) - len(ids)
        types = np.array(encoded.get("token_type_ids", np.zeros_like(ids)), np.int32)
        return [EncodedText(ids=ids, token_types=types, label=float(label), cut=cut)]

    def lost_characters(self, example: Example | Conversation) -> set[str]:
        """The characters that the tokens do not give back; white space, case and accents aside."""
        text = " ".join(self.as_example(example).sentences)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return _letters(text) - _letters(self.tokenizer.decode(ids))

    def fill_row(self, texts: Sequence[EncodedText]) -> LabeledBatch:
        """One row, fields [T] and []; of no text a row without loss."""
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
    """The characters of a text, without case, accents and white space."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return {c for c in plain if not c.isspace() and not unicodedata.combining(c)}
