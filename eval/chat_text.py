"""Marks text from a chat template, so that it is tokenized as in training."""

from collections.abc import Sequence
from typing import Any

from peft_jax.data.examples import Span


class ChatText(str):
    """Text that begins with the output of a chat template.

    No begin token is added to it, because a template writes its own. Plain text with the same
    characters gets the tokenizer's begin token.

    Attributes:
      ids: Token ids as in training, if the text is a whole prompt.
      plain: Spans whose control tokens are tokenized as characters.
      templated: Number of leading characters that the template wrote.
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
        """Marks a text and its tokens; without `templated`, the template wrote all of it."""
        made = super().__new__(cls, text)
        made.ids = None if ids is None else tuple(ids)
        made.plain = tuple(plain)
        made.templated = len(text) if templated is None else templated
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns the arguments that rebuild the text, for `copy` and `pickle`."""
        return ChatText, (str(self), self.ids, self.plain, self.templated)

    def __add__(self, other: str) -> "ChatText":
        """Appends a continuation, as the harness does; the result is still marked."""
        return ChatText(str.__add__(self, other), None, self.plain, self.templated)

    def __getitem__(self, key: Any) -> str:
        """Returns a slice, which stays marked if it starts at the beginning."""
        part = str.__getitem__(self, key)
        begins = isinstance(key, slice) and not key.start and key.step in (None, 1)
        if not begins:
            return part
        plain = [(start, stop) for start, stop in self.plain if stop <= len(part)]
        return ChatText(part, None, plain, min(self.templated, len(part)))
