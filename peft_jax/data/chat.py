"""Renders conversations by a chat template, and locates the assistant's turns in the text."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Conversation, Example, Piece, Span
from peft_jax.data.render import Rendered, RenderRequest
from peft_jax.data.templates import ChatTemplate, Messages, without_nulls

_SHOWN = 40
"""Number of characters shown before the first difference of two texts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Turn:
    """A turn of the assistant in the rendered text.

    Attributes:
      message: Index of its message.
      start: First character, after the generation prompt.
      stop: One past the last character.
      loss_spans: Spans in the loss, usually the whole turn.
    """

    message: int
    start: int
    stop: int
    loss_spans: tuple[Span, ...]


class ChatRenderer:
    """Renders conversations as text by a tokenizer's chat template.

    The assistant's turns are located for any template, by comparing rendered texts.

    - A turn starts after its prompt, which is the messages before it rendered with the generation
      prompt. A model starts to generate there, so the whole text must begin with the prompt. If it
      does not, training would differ from generation, and the conversation is rejected.
    - A turn ends where the messages up to it, rendered alone, stop agreeing with the whole text.
      White space after the end-of-turn token belongs to the template and is not in the loss.
    - If the template marks the assistant's text with `{% generation %}`, the marked text after the
      generation prompt is in the loss.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str = "",
        system_prompt: str = "",
        split_special_tokens: bool = False,
    ):
        """Loads the template.

        Args:
          tokenizer: A transformers tokenizer.
          chat_template: File with a Jinja template; empty: the tokenizer's own.
          system_prompt: System turn for conversations without one; empty: none.
          split_special_tokens: Whether to track control tokens in the text of messages, except the
            assistant's (`Example.plain`).

        Raises:
          ValueError: There is no template, or it can never be rendered.
        """
        self._template = ChatTemplate(
            tokenizer, path=chat_template, split_special_tokens=split_special_tokens
        )
        # Longest first, since a tokenizer prefers a token to its prefixes.
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._longest_token = max(map(len, added), default=0)
        self._tokens = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._system_prompt = system_prompt

    def render(self, conversation: Conversation) -> Example:
        """Renders a conversation, with the assistant's turns in the loss.

        Raises:
          BadRowError: The template rejects the conversation, its generation prompt differs from the
            text before an assistant's turn, or the assistant's turns cannot be located.
        """
        messages = self._messages(conversation.messages)
        tools = without_nulls(conversation.tools)
        loss_turns = set(_turns_of(messages))
        if conversation.loss_turns is not None:
            # An inserted system turn shifts the indices of the others.
            moved = len(messages) - len(conversation.messages)
            loss_turns &= {index + moved for index in conversation.loss_turns}
        if not loss_turns:
            raise BadRowError("empty", "the assistant has no text in the loss")
        whole, turns = self._read(messages, tools, RenderRequest(messages=messages), loss_turns)
        pieces = _pieces(whole.text, turns, loss_turns)
        if not any(piece.in_loss for piece in pieces):
            raise BadRowError("empty", "the assistant has no text")
        example = Example(pieces=pieces, templated=True, plain=whole.plain)
        content = _content(messages[max(loss_turns)])
        lead = example.completion.partition(content)[0] if content else ""
        return dataclasses.replace(
            example,
            answer=conversation.answer or content,
            choices=tuple(lead + choice.strip() for choice in conversation.choices),
            label=conversation.label,
        )

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> Example:
        """Renders a conversation as an example whose answer is still to be generated.

        Its prompt has the same text and, after encoding, the same tokens as in training.

        Raises:
          BadRowError: The template rejects the conversation.
        """
        given = self._messages(messages)
        request = RenderRequest(messages=given, generation_prompt=True)
        whole, turns = self._read(given, without_nulls(tools), request, set())
        pieces = (*_pieces(whole.text, turns, set()), Piece(text="", in_loss=True))
        return Example(pieces=pieces, templated=True, plain=whole.plain)

    def continued(self, messages: Sequence[Mapping[str, Any]]) -> Rendered:
        """Renders a conversation whose last message is left open, to be continued.

        Raises:
          BadRowError: The template rejects the conversation.
        """
        request = RenderRequest(messages=self._messages(messages), continued=True)
        return self._template.render([request])[0]

    def _messages(self, messages: Sequence[Mapping[str, Any]]) -> Messages:
        if not messages:
            raise BadRowError("empty", "there are no messages")
        given = without_nulls(messages)
        if self._system_prompt and given[0].get("role") != "system":
            given.insert(0, {"role": "system", "content": self._system_prompt})
        return given

    def _read(
        self, messages: Messages, tools: Messages, whole: RenderRequest, loss_turns: set[int]
    ) -> tuple[Rendered, list[_Turn]]:
        """Renders a conversation and locates the assistant's turns.

        Args:
          messages: Messages of the conversation.
          tools: Tools that it may call.
          whole: Request of the whole text.
          loss_turns: Message indices of the turns in the loss.

        Raises:
          BadRowError: A turn in the loss cannot be located; other such turns are ignored.
        """
        indices = list(_turns_of(messages))
        requests = [whole]
        for index in indices:
            requests += [
                RenderRequest(messages=messages[: index + 1]),
                _prompt_request(messages, index),
            ]
        rendered = self._template.render(requests, tools)
        text = rendered[0].text
        with_turn, prompts = ([part.text for part in rendered[first::2]] for first in (1, 2))
        if self._template.marks_turns(tools):
            return rendered[0], self._marked_turns(rendered[0], indices, prompts, loss_turns)
        turns: list[_Turn] = []
        for index, up_to, prompt in zip(indices, with_turn, prompts, strict=True):
            try:
                start, stop = self._find_turn(messages, index, text, up_to, prompt)
                if turns and start < turns[-1].stop:
                    raise _turn_error(index, up_to, text)
                if index in loss_turns:
                    self._check_header(messages, index, tools, text[start:stop], prompt)
            except BadRowError:
                if index in loss_turns:
                    raise
                continue
            turns.append(_Turn(message=index, start=start, stop=stop, loss_spans=((start, stop),)))
        return rendered[0], turns

    def _marked_turns(
        self, whole: Rendered, indices: Sequence[int], prompts: Sequence[str], loss_turns: set[int]
    ) -> list[_Turn]:
        """Locates the assistant's turns in a text whose template marks them.

        Args:
          whole: Text, with its marks.
          indices: Message indices of the assistant's turns.
          prompts: Prompt of each turn.
          loss_turns: Message indices of the turns in the loss.

        Raises:
          BadRowError: The text does not begin with a prompt, or the marks start after it.
        """
        starts = []
        for index, prompt in zip(indices, prompts, strict=True):
            starts.append(self._common_prefix(prompt, whole.text))
            if index and index in loss_turns and starts[-1] < len(prompt):
                raise _prompt_error("", prompt, whole.text)
        turns = []
        for number, (index, start) in enumerate(zip(indices, starts, strict=True)):
            following = [*starts, len(whole.text)][number + 1]
            # A header within the marks is part of the prompt, so it is not in the loss.
            spans = tuple((max(a, start), b) for a, b in whole.marked if start < b <= following)
            if spans and spans[0][0] > start and index in loss_turns and index:
                raise _prompt_error(
                    "the template marks the assistant's text after the end of the generation"
                    " prompt: ",
                    whole.text[:start],
                    whole.text[: spans[0][0]],
                )
            if spans:
                start, stop = (start if index else spans[0][0]), spans[-1][1]
                turns.append(_Turn(message=index, start=start, stop=stop, loss_spans=spans))
        return turns

    def _find_turn(
        self, messages: Messages, index: int, text: str, with_turn: str, prompt: str
    ) -> Span:
        """Returns the span of a turn, including its end-of-turn token.

        Args:
          messages: Messages of the conversation.
          index: Index of the turn's message.
          text: Whole text.
          with_turn: Text up to and including the turn.
          prompt: Prompt of the turn; for the first message, a different turn.
        """
        content = _content(messages[index])
        common = self._common_prefix(with_turn, text)
        up_to = text[:common]
        start = self._common_prefix(prompt, up_to)
        if index and start < len(prompt):
            raise _prompt_error("", prompt, text)
        turn = up_to[start:]
        if content not in turn:
            if common < len(with_turn):
                raise _turn_error(index, with_turn, text)
            raise BadRowError(
                "chat template",
                f"the template changes the assistant's text in turn {index + 1} from"
                f" {content[:_SHOWN]!r} to {turn[:_SHOWN]!r}",
            )
        # Without an end-of-turn token, only white space ends a turn.
        has_end = not turn.rstrip().endswith(content) or not content
        return start, start + len(turn.rstrip()) if has_end else len(up_to)

    def _check_header(
        self, messages: Messages, index: int, tools: Messages, turn: str, prompt: str
    ) -> None:
        """Rejects a turn that begins with a header missing from its generation prompt.

        Args:
          messages: Messages of the conversation.
          index: Index of the turn's message.
          tools: Tools that the conversation may call.
          turn: Text that would be in the loss.
          prompt: Prompt of the turn.
        """
        content = _content(messages[index])
        if not index or (content and not turn.partition(content)[0].strip()):
            return
        other = {**messages[index], "content": _different_text(content)}
        before, after_other = (
            part.text
            for part in self._template.render(
                [
                    RenderRequest(messages=messages[:index]),
                    RenderRequest(messages=[*messages[:index], other]),
                ],
                tools,
            )
        )
        # After a generation prompt, the model itself generates the rest of a header ("<think>").
        if prompt == before:
            header = turn[: self._common_prefix(after_other, prompt + turn) - len(prompt)]
            if header.strip():
                raise _prompt_error(
                    f"the template writes {header!r} before the assistant's text, but nothing for"
                    " add_generation_prompt: ",
                    prompt,
                    prompt + turn,
                )

    def _common_prefix(self, one: str, other: str) -> int:
        """Returns the length of the common prefix of two texts that splits no added token."""
        common = min(len(one), len(other))
        if one[:common] != other[:common]:
            pairs = zip(one, other, strict=False)
            common = next(index for index, (a, b) in enumerate(pairs) if a != b)
        # "<|im_start|>" and "</s>" share their first character, but are different tokens.
        for text in (one, other):
            first = max(common - self._longest_token, 0)
            for token in self._tokens.finditer(text, first, common + self._longest_token):
                if token.start() < common < token.end():
                    return token.start()
        return common


def _turn_error(index: int, with_turn: str, text: str) -> BadRowError:
    """Returns the error for an assistant's turn that cannot be located."""
    last, amid = _from_first_difference(with_turn, text)
    return BadRowError(
        "chat template",
        f"the assistant's text in turn {index + 1} cannot be located: the template writes {last!r}"
        f" if nothing follows, but {amid!r} if more does; use a template that marks it with"
        " {% generation %} (data.chat_template)",
    )


def _prompt_error(why: str, prompt: str, text: str) -> BadRowError:
    """Returns the error for a training text that does not begin with its generation prompt."""
    given, trained = _from_first_difference(prompt, text)
    if not why and "".join(text.split()).startswith("".join(prompt.split())):
        why = "they differ in white space, such as the indentation of a template's file: "
    return BadRowError(
        "generation prompt",
        f"{why}generation has {given!r}, but training has {trained!r}; the second must begin with"
        " the first (data.chat_template)",
    )


def _from_first_difference(one: str, other: str) -> tuple[str, str]:
    """Cuts two texts to start shortly before their first difference.

    Example:
      >>> _from_first_difference("Who? <think>", "Who? Ivy.")
      ('Who? <think>', 'Who? Ivy.')
    """
    common = next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    first = max(common - _SHOWN, 0)
    lead = "…" if first else ""
    stop = max(len(one), common) + _SHOWN
    return lead + one[first:stop], lead + other[first:stop]


def _prompt_request(messages: Messages, index: int) -> RenderRequest:
    """Returns the request of a turn's prompt; for the first message, a turn with other text."""
    if index:
        return RenderRequest(messages=messages[:index], generation_prompt=True)
    content = _different_text(_content(messages[0]))
    return RenderRequest(messages=[{**messages[0], "content": content}])


def _turns_of(messages: Messages) -> Iterator[int]:
    """Yields the indices of the assistant's messages."""
    return (index for index, one in enumerate(messages) if one.get("role") == "assistant")


def _content(message: Mapping[str, Any]) -> str:
    """Returns a message's text, trimmed as a template may do."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _different_text(content: str) -> str:
    """Returns a text that begins differently."""
    return "B" if content.startswith("A") else "A"


def _pieces(text: str, turns: Sequence[_Turn], loss_turns: set[int]) -> tuple[Piece, ...]:
    """Splits the text at the assistant's turns, some of which are in the loss."""
    pieces: list[Piece] = []
    done = 0
    for turn in turns:
        pieces.append(Piece(text=text[done : turn.start], in_loss=False))
        done = turn.start
        for start, stop in turn.loss_spans if turn.message in loss_turns else ():
            pieces += [
                Piece(text=text[done:start], in_loss=False, generated=True),
                Piece(text=text[start:stop], in_loss=True),
            ]
            done = stop
        pieces.append(Piece(text=text[done : turn.stop], in_loss=False, generated=True))
        done = turn.stop
    pieces.append(Piece(text=text[done:], in_loss=False))
    return tuple(piece for piece in pieces if piece.text)
