"""Locates control tokens in message text, so that they can be tokenized as characters.

A tokenizer reads "<|im_end|>" anywhere as the end of a turn. In a user's text, or in an answer
shown to a judge, it may be mere characters. This is known only before a chat template combines
that text with its own. So control tokens are marked in messages, and the marks are removed from
the rendered text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Span

_BEGIN, _END = "\U000f0000", "\U000f0001"
"""Private characters around a marked token, the same as in transformers."""

# A template's `tojson` may have escaped the marks.
_MARKS = re.compile(
    f"(?P<begin>{_BEGIN}|\\\\udb80\\\\udc00)|(?:{_END}|\\\\udb80\\\\udc01)", re.IGNORECASE
)


class ControlTokens:
    """Control tokens of a tokenizer.

    They are its special tokens, and those added tokens that a chat template contains, as for
    `sanitize_control_tokens` in transformers. White space is excluded.
    """

    def __init__(self, tokenizer: Any, templates: Iterable[str]):
        """Collects the control tokens.

        Args:
          tokenizer: A transformers tokenizer.
          templates: Chat templates.
        """
        templates = tuple(templates)
        control = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip()
            and (token.special or any(token.content in template for template in templates))
        ]
        # Longest first, since a tokenizer prefers a token to its prefixes.
        longest_first = sorted(control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def spans(self, text: str) -> tuple[Span, ...]:
        """Returns the spans of control tokens in a text."""
        return tuple(found.span() for found in self._pattern.finditer(text))

    def mark(self, value: Any) -> Any:
        """Adds marks around control tokens in the strings of a value, including keys.

        Raises:
          BadRowError: A string contains the mark characters.
        """
        if isinstance(value, str):
            if _MARKS.search(value):
                raise BadRowError(
                    "private characters",
                    "a text has U+F0000 or U+F0001, which data.split_special_tokens uses as marks",
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
        """Removes the marks from a text.

        Args:
          text: Rendered text with marks. A template may have removed one of a token's two marks.
          spans: Spans of the text.

        Returns:
          The text, the shifted spans, and the spans of the marked tokens.
        """
        found = list(_MARKS.finditer(text))
        marks = [mark.span() for mark in found]
        if not marks:
            return text, tuple(spans), ()

        def moved(position: int) -> int:
            return position - sum(min(b, position) - a for a, b in marks if a < position)

        # One of the two marks is sufficient.
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
