"""Chat templates: messages to text, in one place for training, evaluation and generation."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.control_tokens import ControlTokens
from peft_jax.data.render import OVER_BOUNDS, Rendered, TemplateError, Wanted, render

Messages = list[dict[str, Any]]
"""Messages, or tools, as `apply_chat_template` takes them."""

_SHORTEST: Messages = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello"},
]
"""What a template is tried on."""

_NEVER_LOADED = ("include", "import", "from", "extends")
"""Jinja's statements that load another template; a chat template has none to load."""


class ChatTemplate:
    """A tokenizer's chat template, or one from a file."""

    def __init__(self, tokenizer: Any, *, path: str = "", split_special_tokens: bool = False):
        """Takes the tokenizer's templates or another.

        Args:
          tokenizer: a transformers tokenizer.
          path: a file with a Jinja template; empty: the tokenizer's own.
          split_special_tokens: tell control tokens in the messages' text, the assistant's aside,
            from those that the template writes.

        Raises:
          ValueError: if there is no template, or one that can never be rendered.
        """
        self._tokenizer = tokenizer
        self._variables = dict(tokenizer.special_tokens_map)
        self._given = _read(path) if path else ""
        own = getattr(tokenizer, "chat_template", None)
        if not path and not own:
            raise ValueError(
                "the tokenizer has no chat template; name a file with one in data.chat_template, or"
                " use a recipe that needs none (alpaca)"
            )
        named = tuple(own.values()) if isinstance(own, Mapping) else (own or "",)
        self._origin = (
            f"data.chat_template is {path!r}" if path else "the tokenizer's chat template"
        )
        self._marks_turns: dict[str, bool] = {}
        for source in (self._given,) if path else named:
            self._learn(source)
        self._control = (
            ControlTokens(tokenizer, self._marks_turns) if split_special_tokens else None
        )

    def _learn(self, source: str) -> None:
        """Takes up a template, unless it fails whatever the conversation.

        Raises:
          ValueError: if it is no Jinja, or goes over a bound on the shortest conversation.
        """
        marks_turns = _marks_turns(source, self._origin)
        try:
            render(source, [Wanted(messages=_SHORTEST)], variables=self._variables)
        except TemplateError as error:
            if error.kind in ("TemplateSyntaxError", "TemplateAssertionError", *OVER_BOUNDS):
                raise ValueError(f"{self._origin}, which cannot be used: {error.detail}") from None
        self._marks_turns[source] = marks_turns

    def source(self, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The template of a conversation, chosen as transformers chooses among named ones.

        Raises:
          BadRowError: if the tokenizer has none for it.
        """
        if self._given:
            return self._given
        try:
            return self._tokenizer.get_chat_template(tools=list(tools) or None)
        except ValueError as error:
            raise BadRowError("chat template", str(error)) from None

    def marks_turns(self, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether a conversation's template marks the assistant's words with `{% generation %}`."""
        source = self.source(tools)
        if source not in self._marks_turns:
            # The tokenizer was given another template meanwhile.
            self._learn(source)
        return self._marks_turns[source]

    def render(
        self, wanted: Sequence[Wanted], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Rendered]:
        """The texts that are wanted of one conversation.

        Args:
          wanted: its messages, or the first few of them.
          tools: the tools that it may call.

        Raises:
          BadRowError: if the template refuses the messages or fails on them.
        """
        control = self._control
        if control is not None:
            wanted = self._with_marks(control, wanted)
            tools = control.mark(tools)
        rendered = render(
            self.source(tools),
            wanted,
            tools=tools,
            variables=self._variables,
            marks=self.marks_turns(tools),
        )
        if control is None:
            return rendered
        unmarked = (control.unmark(one.text, one.marked) for one in rendered)
        return [Rendered(text=text, marked=marked, plain=plain) for text, marked, plain in unmarked]

    def _with_marks(self, control: ControlTokens, wanted: Sequence[Wanted]) -> list[Wanted]:
        """What is wanted, with marks around the control tokens in the text of others."""
        # A message that stands in several texts stays one.
        marked: dict[int, Mapping[str, Any]] = {}
        for message in (message for one in wanted for message in one.messages):
            is_own = message.get("role") == "assistant"
            if id(message) not in marked:
                marked[id(message)] = message if is_own else control.mark(message)
        return [
            dataclasses.replace(one, messages=[marked[id(message)] for message in one.messages])
            for one in wanted
        ]


def without_nulls(value: Any) -> Any:
    """A value without the keys that hold null, at any depth.

    Arrow gives every object of a column the keys of all others, and null for those it has not: what
    jsonl gives and what parquet gives are the same without them.

    Raises:
      BadRowError: if the value is nested too deep.

    Example:
      >>> without_nulls({"zone": "UTC", "left": None, "of": [{"a": None}, None]})
      {'zone': 'UTC', 'of': [{}, None]}
    """
    try:
        return _without_nulls(value)
    except RecursionError:
        raise BadRowError("wrong type", "an object is nested too deep") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_without_nulls(item) for item in value]
    return value


def _read(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"data.chat_template is {path!r}: there is no such file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template is {path!r}, which cannot be read: {error}") from None


def _marks_turns(source: str, origin: str) -> bool:
    """Whether a template marks the assistant's words; a comment that names the mark is none.

    Raises:
      ValueError: if it is no Jinja, or loads another template.
    """
    try:
        statements = set(_statements(source))
    except jinja2.TemplateSyntaxError as error:
        detail = f"{error.message} (line {error.lineno})"
        raise ValueError(f"{origin}, which cannot be used: no Jinja template: {detail}") from None
    for name in _NEVER_LOADED:
        if name in statements:
            raise ValueError(
                f"{origin}, which cannot be used: it has {{% {name} %}}, and there is no other"
                " template to load; a chat template is one file"
            )
    return "generation" in statements


def _statements(source: str) -> Iterator[str]:
    """The names that a template's statements begin with."""
    begun = False
    for _, kind, value in jinja2.Environment().lex(source):
        if kind == "name" and begun:
            yield value
        begun = kind == "block_begin" or (begun and kind == "whitespace")
