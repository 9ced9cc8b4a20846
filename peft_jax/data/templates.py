"""Renders messages by chat templates, for training, evaluation and generation alike."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.control_tokens import ControlTokens
from peft_jax.data.render import LIMIT_KINDS, Rendered, RenderRequest, TemplateError, render

Messages = list[dict[str, Any]]
"""Messages or tools, in the format of `apply_chat_template`."""

_SHORTEST: Messages = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello"},
]
"""Conversation that every template is tested with."""

_NEVER_LOADED = ("include", "import", "from", "extends")
"""Jinja statements that load another template, which a chat template cannot do."""


class ChatTemplate:
    """Chat template of a tokenizer or from a file."""

    def __init__(self, tokenizer: Any, *, path: str = "", split_special_tokens: bool = False):
        """Loads and tests the templates.

        Args:
          tokenizer: A transformers tokenizer.
          path: File with a Jinja template; empty: the tokenizer's own.
          split_special_tokens: Whether to track control tokens in the text of messages, except the
            assistant's.

        Raises:
          ValueError: There is no template, or it can never be rendered.
        """
        self._tokenizer = tokenizer
        self._variables = dict(tokenizer.special_tokens_map)
        self._given = _read(path) if path else ""
        own = getattr(tokenizer, "chat_template", None)
        if not path and not own:
            raise ValueError(
                "the tokenizer has no chat template; set data.chat_template to a file with one, or"
                " use a recipe that needs none (alpaca)"
            )
        named = tuple(own.values()) if isinstance(own, Mapping) else (own or "",)
        self._origin = (
            f"data.chat_template is {path!r}" if path else "the tokenizer's chat template"
        )
        self._marks_turns: dict[str, bool] = {}
        for source in (self._given,) if path else named:
            self._register(source)
        self._control = (
            ControlTokens(tokenizer, self._marks_turns) if split_special_tokens else None
        )

    def _register(self, source: str) -> None:
        """Tests and registers a template.

        Raises:
          ValueError: It is not valid Jinja, or exceeds a limit on the shortest conversation.
        """
        marks_turns = _marks_turns(source, self._origin)
        try:
            render(source, [RenderRequest(messages=_SHORTEST)], variables=self._variables)
        except TemplateError as error:
            if error.kind in ("TemplateSyntaxError", "TemplateAssertionError", *LIMIT_KINDS):
                raise ValueError(f"{self._origin}, which cannot be used: {error.detail}") from None
        self._marks_turns[source] = marks_turns

    def source(self, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Returns the template for a conversation, chosen among named ones as by transformers.

        Raises:
          BadRowError: The tokenizer has no template for it.
        """
        if self._given:
            return self._given
        try:
            return self._tokenizer.get_chat_template(tools=list(tools) or None)
        except ValueError as error:
            raise BadRowError("chat template", str(error)) from None

    def marks_turns(self, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Returns whether the template marks the assistant's text with `{% generation %}`."""
        source = self.source(tools)
        if source not in self._marks_turns:
            # The tokenizer's template was replaced in the meantime.
            self._register(source)
        return self._marks_turns[source]

    def render(
        self, requests: Sequence[RenderRequest], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Rendered]:
        """Renders texts of one conversation.

        Args:
          requests: Requests, each of the first messages of the conversation.
          tools: Tools that it may call.

        Raises:
          BadRowError: The template rejects the messages or fails on them.
        """
        control = self._control
        if control is not None:
            requests = self._with_marks(control, requests)
            tools = control.mark(tools)
        rendered = render(
            self.source(tools),
            requests,
            tools=tools,
            variables=self._variables,
            marks=self.marks_turns(tools),
        )
        if control is None:
            return rendered
        unmarked = (control.unmark(one.text, one.marked) for one in rendered)
        return [Rendered(text=text, marked=marked, plain=plain) for text, marked, plain in unmarked]

    def _with_marks(
        self, control: ControlTokens, requests: Sequence[RenderRequest]
    ) -> list[RenderRequest]:
        """Adds marks around control tokens in the messages, except the assistant's."""
        # A message that several texts share stays one object, so that it is sent once.
        marked: dict[int, Mapping[str, Any]] = {}
        for message in (message for one in requests for message in one.messages):
            is_own = message.get("role") == "assistant"
            if id(message) not in marked:
                marked[id(message)] = message if is_own else control.mark(message)
        return [
            dataclasses.replace(one, messages=[marked[id(message)] for message in one.messages])
            for one in requests
        ]


def without_nulls(value: Any) -> Any:
    """Removes keys whose value is null, at any depth.

    Arrow gives every object of a column the keys of all others, with null for missing ones. Without
    nulls, rows from jsonl and parquet are equal.

    Raises:
      BadRowError: The value is nested too deeply.

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
    """Returns whether a template has `{% generation %}` outside of comments.

    Raises:
      ValueError: It is not valid Jinja, or loads another template.
    """
    try:
        statements = set(_statements(source))
    except jinja2.TemplateSyntaxError as error:
        detail = f"{error.message} (line {error.lineno})"
        raise ValueError(f"{origin}, which cannot be used: not valid Jinja: {detail}") from None
    for name in _NEVER_LOADED:
        if name in statements:
            raise ValueError(
                f"{origin}, which cannot be used: it has {{% {name} %}}, but a chat template must"
                " be one file"
            )
    return "generation" in statements


def _statements(source: str) -> Iterator[str]:
    """Yields the first name of each statement of a template."""
    begun = False
    for _, kind, value in jinja2.Environment().lex(source):
        if kind == "name" and begun:
            yield value
        begun = kind == "block_begin" or (begun and kind == "whitespace")
