"""Conversations through a chat template, with the assistant's words told apart."""

from pathlib import Path
from typing import Any

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Conversation, Example, Piece

Messages = list[dict[str, Any]]
"""Messages, or tools, as `apply_chat_template` takes them."""

Span = tuple[int, int]
"""The first character of a stretch of text, and one past its last."""


class ChatRenderer:
    """Turns conversations into text by a tokenizer's chat template.

    The assistant's turns are found without knowing the template. Where it marks them itself, with
    `{% generation %}`, its marks are used. Otherwise a turn begins where the text of what goes
    before it, with a generation prompt, stops agreeing with the whole text: that is where a model
    begins to write. It ends where the text of what goes up to it stops agreeing; white space after
    the token that ends the turn is the template's, and is not learnt.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str = "", system_prompt: str = ""):
        """Takes the tokenizer's template or another.

        Args:
          tokenizer: a transformers tokenizer.
          chat_template: a file with a Jinja template; empty: the tokenizer's own.
          system_prompt: a system turn for conversations without one; empty: none.

        Raises:
          ValueError: if there is no template.
        """
        self._tokenizer = tokenizer
        self._added_tokens = tuple(tokenizer.get_added_vocab())
        self._system_prompt = system_prompt
        if chat_template:
            if not Path(chat_template).is_file():
                raise ValueError(f"data.chat_template is {chat_template!r}: there is no such file")
            self._template = Path(chat_template).read_text(encoding="utf-8")
        else:
            self._template = _own_template(tokenizer)
        self._marks_turns = "{% generation" in self._template or "{%- generation" in self._template

    def render(self, conversation: Conversation) -> Example:
        """The conversation as text, the assistant's turns learnt.

        Raises:
          BadRowError: if the template refuses the conversation, or the assistant's turns cannot be
            told apart in its text.
        """
        messages = [dict(message) for message in conversation.messages]
        if self._system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        tools = [dict(tool) for tool in conversation.tools] or None
        text = self._apply(messages, tools)
        if self._marks_turns:
            spans = self._marked_spans(messages, tools)
        else:
            spans = self._found_spans(messages, tools, text)
        pieces = _pieces(text, spans)
        last = next(turn for turn in reversed(messages) if turn["role"] == "assistant")
        content = str(last.get("content") or "").strip()
        lead = pieces[max(i for i, piece in enumerate(pieces) if piece.learn)].text
        lead = lead.partition(content)[0] if content else ""
        return Example(
            pieces=pieces,
            answer=conversation.answer or content,
            choices=tuple(lead + choice.strip() for choice in conversation.choices),
            label=conversation.label,
            templated=True,
        )

    def _found_spans(self, messages: Messages, tools: Messages | None, text: str) -> list[Span]:
        """The characters that the assistant writes, by rendering parts of the conversation."""
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            content = str(message.get("content") or "").strip()
            up_to = text[: self._agreement(self._apply(messages[: index + 1], tools), text)]
            if index:
                asked = self._apply(messages[:index], tools, add_generation_prompt=True)
                start = self._agreement(asked, up_to)
            else:
                start = max(up_to.find(content), 0)
            done = spans[-1][1] if spans else 0
            question = messages[index - 1]
            heard = str(question.get("content") or "").strip() if question["role"] == "user" else ""
            if start < done or heard not in text[done:start] or content not in up_to[start:]:
                raise BadRowError(
                    "chat template",
                    f"the assistant's words in turn {index + 1} cannot be told apart, because the"
                    " template writes a turn differently when more follow; use one that marks"
                    " them with {% generation %} (data.chat_template)",
                )
            turn = up_to[start:].rstrip()
            # In a template without an end-of-turn token, white space is all that ends a turn.
            has_end = not turn.endswith(content) or not content
            spans.append((start, start + len(turn) if has_end else len(up_to)))
        return spans

    def _agreement(self, one: str, other: str) -> int:
        """How many characters two texts have in common at their start, no token of which is cut."""
        pairs = zip(one, other, strict=False)
        differs = (index for index, (a, b) in enumerate(pairs) if a != b)
        common = next(differs, min(len(one), len(other)))
        # "<|im_start|>" and "</s>" begin alike, and are yet two different tokens.
        for token in self._added_tokens:
            for text in (one, other):
                start = text.find(token, max(common - len(token) + 1, 0), common + len(token) - 1)
                if 0 <= start < common:
                    return start
        return common

    def _marked_spans(self, messages: Messages, tools: Messages | None) -> list[Span]:
        encoded = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        spans: list[Span] = []
        was_learnt = False
        pairs = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        for learnt, (start, stop) in pairs:
            if learnt:
                spans = (
                    [*spans[:-1], (spans[-1][0], stop)] if was_learnt else [*spans, (start, stop)]
                )
            was_learnt = bool(learnt)
        return spans

    def _apply(
        self,
        messages: Messages,
        tools: Messages | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise BadRowError("chat template", str(error)) from None


def _own_template(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template; name a file with one in data.chat_template, or use"
            " a recipe that needs none (alpaca)"
        )
    return tokenizer.get_chat_template()


def _pieces(text: str, spans: list[Span]) -> tuple[Piece, ...]:
    """The text cut at the spans, which are learnt."""
    pieces: list[Piece] = []
    done = 0
    for start, stop in spans:
        pieces += [
            Piece(text=text[done:start], learn=False),
            Piece(text=text[start:stop], learn=True),
        ]
        done = stop
    pieces.append(Piece(text=text[done:], learn=False))
    pieces = [piece for piece in pieces if piece.text]
    if not any(piece.learn for piece in pieces):
        raise BadRowError("empty", "the assistant says nothing")
    return tuple(pieces)
