"""Texts that a chat template wrote, which are tokenized as training tokenizes them."""

from collections.abc import Sequence
from typing import Any

from peft_jax.data.examples import Span


class ChatText(str):
    """A text that a chat template wrote, or begins with one.

    Nothing is put before it: a template writes its own beginning. A plain text with the same
    characters has the tokenizer's begin token before it.

    Attributes:
      ids: its tokens as training has them, where it is a whole prompt.
      plain: where control tokens in it are no more than their characters, if they are told apart.
      templated: Number of characters that the template wrote; what follows is others' text.
    """

    ids: tuple[int, ...] | None
    plain: tuple[Span, ...]
    templated: int

    def __new__(
        cls,
        text: str,
        ids: Sequence[int] | None = None,
        plain: Sequence[Span] = (),
        templated: int | None = None,
    ) -> "ChatText":
        """Makes one of a text and its tokens; without `templated` the template wrote all of it."""
        made = super().__new__(cls, text)
        made.ids = None if ids is None else tuple(ids)
        made.plain = tuple(plain)
        made.templated = len(text) if templated is None else templated
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made of."""
        return ChatText, (str(self), self.ids, self.plain, self.templated)

    def __add__(self, other: str) -> "ChatText":
        """The text with more behind it, as the harness puts a continuation."""
        return ChatText(str.__add__(self, other), None, self.plain, self.templated)

    def __getitem__(self, key: Any) -> str:
        """A part of the text, which is a chat's too if it begins where the text does."""
        part = str.__getitem__(self, key)
        begins = isinstance(key, slice) and not key.start and key.step in (None, 1)
        if not begins:
            return part
        plain = [(start, stop) for start, stop in self.plain if stop <= len(part)]
        return ChatText(part, None, plain, min(self.templated, len(part)))
