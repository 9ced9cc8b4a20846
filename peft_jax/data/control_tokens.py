"""Control tokens in others' text: where they stand, so that they can be tokenized as characters.

A tokenizer reads "<|im_end|>" as the end of a turn wherever it stands. In a user's text, or in an
answer that a judge is shown, it may be no more than these characters. Which it is can be told only
before a chat template joins that text with its own, so it is marked there, and the marks are taken
out of what the template makes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Span

_BEGIN, _END = "\U000f0000", "\U000f0001"
"""What stands around a marked token; transformers marks with the same private characters."""

# A template's `tojson` may have escaped the marks.
_MARKS = re.compile(
    f"(?P<begin>{_BEGIN}|\\\\udb80\\\\udc00)|(?:{_END}|\\\\udb80\\\\udc01)", re.IGNORECASE
)


class ControlTokens:
    """The control tokens of a tokenizer.

    They are its special tokens, and of the tokens that were added to it those that a chat template
    writes, as transformers has it for `sanitize_control_tokens`. White space is none.
    """

    def __init__(self, tokenizer: Any, templates: Iterable[str]):
        """Finds them.

        Args:
          tokenizer: a transformers tokenizer.
          templates: the chat templates.
        """
        templates = tuple(templates)
        control = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip()
            and (token.special or any(token.content in template for template in templates))
        ]
        # The longest first: a tokenizer takes a token before the ones that it begins with.
        longest_first = sorted(control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def spans(self, text: str) -> tuple[Span, ...]:
        """Where control tokens stand in a text."""
        return tuple(found.span() for found in self._pattern.finditer(text))

    def mark(self, value: Any) -> Any:
        """A value with marks around the control tokens of its texts, keys too.

        Raises:
          BadRowError: if a text has the characters of the marks.
        """
        if isinstance(value, str):
            if _MARKS.search(value):
                raise BadRowError(
                    "private characters",
                    "a text has U+F0000 or U+F0001, which data.split_special_tokens marks with",
                )
            return self._pattern.sub(f"{_BEGIN}\\g<0>{_END}", value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.mark(item) for item in value]
        return value

    def unmark(
        self, text: str, spans: Sequence[Span] = ()
    ) -> tuple[str, tuple[Span, ...], tuple[Span, ...]]:
        """A text without the marks.

        Args:
          text: what a template made of marked texts. It may have cut one of a token's two marks.
          spans: stretches of it.

        Returns:
          The text, the spans in it, and where it has the tokens that were marked.
        """
        found = list(_MARKS.finditer(text))
        marks = [mark.span() for mark in found]
        if not marks:
            return text, tuple(spans), ()

        def moved(position: int) -> int:
            return position - sum(min(b, position) - a for a, b in marks if a < position)

        # One mark of the two is enough.
        behind = {mark.end() for mark in found if mark["begin"]}
        before = {mark.start() for mark in found if not mark["begin"]}
        plain = [
            (moved(start), moved(stop))
            for start, stop in self.spans(text)
            if start in behind or stop in before
        ]
        return (
            _MARKS.sub("", text),
            tuple((moved(start), moved(stop)) for start, stop in spans),
            tuple(plain),
        )
