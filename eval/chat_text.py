"""Texts that a chat template wrote, which are tokenised as training tokenises them."""

from collections.abc import Sequence
from typing import Any


class ChatText(str):
    """A text that a chat template wrote, or begins with one.

    Nothing is put before it: a template writes its own beginning. A plain text with the same
    characters has the tokenizer's begin token before it.

    Attributes:
      ids: its tokens as training has them, where it is a whole prompt.
    """

    ids: tuple[int, ...] | None

    def __new__(cls, text: str, ids: Sequence[int] | None = None) -> "ChatText":
        """Makes one of a text and its tokens."""
        made = super().__new__(cls, text)
        made.ids = None if ids is None else tuple(ids)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made of."""
        return ChatText, (str(self), self.ids)

    def __add__(self, other: str) -> "ChatText":
        """The text with more behind it, as the harness puts a continuation."""
        return ChatText(str.__add__(self, other))

    def __getitem__(self, key: Any) -> str:
        """A part of the text, which is a chat's too if it begins where the text does."""
        part = str.__getitem__(self, key)
        begins = isinstance(key, slice) and not key.start and key.step in (None, 1)
        return ChatText(part) if begins else part
