"""Conversations through a chat template, with the assistant's words told apart."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.examples import Conversation, Example, Piece, Span
from peft_jax.data.render import Rendered, Wanted
from peft_jax.data.templates import ChatTemplate, Messages, without_nulls

_SHOWN = 40
"""How many characters of two texts are shown before they differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Turn:
    """One turn of the assistant, in the text that is trained on.

    Attributes:
      message: the index of its message.
      start: its first character, behind the generation prompt.
      stop: one past its last character.
      learned: what of it is learned, usually all.
    """

    message: int
    start: int
    stop: int
    learned: tuple[Span, ...]


class ChatRenderer:
    """Turns conversations into text by a tokenizer's chat template.

    The assistant's turns are found without knowing the template. A turn begins where the text of
    what goes before it ends, rendered with the generation prompt: that is where a model begins to
    write, so this text must be how the whole text begins. A template that writes the one otherwise
    than the other would train on what is never asked, and the conversation is refused. The turn
    ends where the text of what goes up to it stops agreeing with the whole; white space after the
    token that ends the turn is the template's, and is not learned. Where a template marks the
    assistant's words itself, with `{% generation %}`, what it marks after the generation prompt is
    learned.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str = "",
        system_prompt: str = "",
        split_special_tokens: bool = False,
    ):
        """Takes the tokenizer's template or another.

        Args:
          tokenizer: a transformers tokenizer.
          chat_template: a file with a Jinja template; empty: the tokenizer's own.
          system_prompt: a system turn for conversations without one; empty: none.
          split_special_tokens: tell control tokens in the messages' text, the assistant's aside,
            from those that the template writes (`Example.plain`).

        Raises:
          ValueError: if there is no template, or one that can never be rendered.
        """
        self._template = ChatTemplate(
            tokenizer, path=chat_template, split_special_tokens=split_special_tokens
        )
        # The longest first: a tokenizer takes a token before the ones that it begins with.
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._longest_token = max(map(len, added), default=0)
        self._tokens = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._system_prompt = system_prompt

    def render(self, conversation: Conversation) -> Example:
        """The conversation as text, the assistant's turns learned.

        Raises:
          BadRowError: if the template refuses the conversation, writes another generation prompt
            than the text has before an assistant's turn, or the assistant's turns cannot be told
            apart in its text.
        """
        messages = self._messages(conversation.messages)
        tools = without_nulls(conversation.tools)
        learned = set(_turns_of(messages))
        if conversation.learned is not None:
            # A system turn that was put before them moves the others.
            moved = len(messages) - len(conversation.messages)
            learned &= {index + moved for index in conversation.learned}
        if not learned:
            raise BadRowError("empty", "the assistant says nothing that is to be learned")
        whole, turns = self._read(messages, tools, Wanted(messages=messages), learned)
        pieces = _pieces(whole.text, turns, learned)
        if not any(piece.learn for piece in pieces):
            raise BadRowError("empty", "the assistant says nothing")
        example = Example(pieces=pieces, templated=True, plain=whole.plain)
        content = _content(messages[max(learned)])
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
        """The conversation as an example whose answer is still to be written.

        Its prompt has the text, and in an encoder the tokens, that training has before that answer.

        Raises:
          BadRowError: if the template refuses the conversation.
        """
        given = self._messages(messages)
        asked = Wanted(messages=given, generation_prompt=True)
        whole, turns = self._read(given, without_nulls(tools), asked, set())
        pieces = (*_pieces(whole.text, turns, set()), Piece(text="", learn=True))
        return Example(pieces=pieces, templated=True, plain=whole.plain)

    def continued(self, messages: Sequence[Mapping[str, Any]]) -> Rendered:
        """The conversation as a text whose last message is left open, to be continued.

        Raises:
          BadRowError: if the template refuses the conversation.
        """
        wanted = Wanted(messages=self._messages(messages), continued=True)
        return self._template.render([wanted])[0]

    def _messages(self, messages: Sequence[Mapping[str, Any]]) -> Messages:
        if not messages:
            raise BadRowError("empty", "there are no messages")
        given = without_nulls(messages)
        if self._system_prompt and given[0].get("role") != "system":
            given.insert(0, {"role": "system", "content": self._system_prompt})
        return given

    def _read(
        self, messages: Messages, tools: Messages, whole: Wanted, learned: set[int]
    ) -> tuple[Rendered, list[_Turn]]:
        """The text of a conversation, and the assistant's turns in it.

        Args:
          messages: the conversation.
          tools: the tools that it may call.
          whole: what of it is wanted as text.
          learned: the turns that are learned, by their messages' indices.

        Raises:
          BadRowError: for a turn that is learned; of others, those that cannot be told apart are
            left out.
        """
        indices = list(_turns_of(messages))
        wanted = [whole]
        for index in indices:
            wanted += [Wanted(messages=messages[: index + 1]), _before(messages, index)]
        rendered = self._template.render(wanted, tools)
        text = rendered[0].text
        with_it, asked = ([part.text for part in rendered[first::2]] for first in (1, 2))
        if self._template.marks_turns(tools):
            return rendered[0], self._marked_turns(rendered[0], indices, asked, learned)
        turns: list[_Turn] = []
        for index, up_to, prompt in zip(indices, with_it, asked, strict=True):
            try:
                start, stop = self._find(messages, index, text, up_to, prompt)
                if turns and start < turns[-1].stop:
                    raise _turn_error(index, up_to, text)
                if index in learned:
                    self._check(messages, index, tools, text[start:stop], prompt)
            except BadRowError:
                if index in learned:
                    raise
                continue
            turns.append(_Turn(message=index, start=start, stop=stop, learned=((start, stop),)))
        return rendered[0], turns

    def _marked_turns(
        self, whole: Rendered, indices: Sequence[int], asked: Sequence[str], learned: set[int]
    ) -> list[_Turn]:
        """The assistant's turns in a text whose template marks them.

        Args:
          whole: the text, with its marks.
          indices: the messages of the assistant's turns.
          asked: the prompt that asks for each turn.
          learned: the turns that are learned.

        Raises:
          BadRowError: if the text does not begin as a prompt does, or the marks begin after it.
        """
        starts = []
        for index, prompt in zip(indices, asked, strict=True):
            starts.append(self._agreement(prompt, whole.text))
            if index and index in learned and starts[-1] < len(prompt):
                raise _prompt_error("", prompt, whole.text)
        turns = []
        for number, (index, start) in enumerate(zip(indices, starts, strict=True)):
            following = [*starts, len(whole.text)][number + 1]
            # A header within the marks stands before the prompt's end, and is not learned.
            spans = tuple((max(a, start), b) for a, b in whole.marked if start < b <= following)
            if spans and spans[0][0] > start and index in learned and index:
                raise _prompt_error(
                    "the template marks the assistant's words later than the generation prompt"
                    " ends: ",
                    whole.text[:start],
                    whole.text[: spans[0][0]],
                )
            if spans:
                start, stop = (start if index else spans[0][0]), spans[-1][1]
                turns.append(_Turn(message=index, start=start, stop=stop, learned=spans))
        return turns

    def _find(self, messages: Messages, index: int, text: str, with_it: str, asked: str) -> Span:
        """The characters that the assistant writes in a turn, to the end of the turn.

        Args:
          messages: the conversation.
          index: of the turn's message.
          text: the whole text.
          with_it: the text up to the turn.
          asked: the prompt that asks for the turn; where nothing goes before it, another turn.
        """
        content = _content(messages[index])
        common = self._agreement(with_it, text)
        up_to = text[:common]
        start = self._agreement(asked, up_to)
        if index and start < len(asked):
            raise _prompt_error("", asked, text)
        turn = up_to[start:]
        if content not in turn:
            if common < len(with_it):
                raise _turn_error(index, with_it, text)
            raise BadRowError(
                "chat template",
                f"the template does not write the assistant's words in turn {index + 1} as they"
                f" are: {content[:_SHOWN]!r} has become {turn[:_SHOWN]!r}",
            )
        # In a template without an end-of-turn token, white space is all that ends a turn.
        has_end = not turn.rstrip().endswith(content) or not content
        return start, start + len(turn.rstrip()) if has_end else len(up_to)

    def _check(
        self, messages: Messages, index: int, tools: Messages, turn: str, asked: str
    ) -> None:
        """Refuses a turn that begins with a header which no generation prompt has.

        Args:
          messages: the conversation.
          index: of the turn's message.
          tools: the tools that the conversation may call.
          turn: what would be learned.
          asked: the prompt that asks for the turn.
        """
        content = _content(messages[index])
        if not index or (content and not turn.partition(content)[0].strip()):
            return
        other = {**messages[index], "content": _other(content)}
        before, otherwise = (
            part.text
            for part in self._template.render(
                [
                    Wanted(messages=messages[:index]),
                    Wanted(messages=[*messages[:index], other]),
                ],
                tools,
            )
        )
        # Behind a generation prompt the model itself writes what is left of a header ("<think>").
        if asked == before:
            header = turn[: self._agreement(otherwise, asked + turn) - len(asked)]
            if header.strip():
                raise _prompt_error(
                    f"the template writes {header!r} before the assistant's words, and nothing with"
                    " add_generation_prompt: ",
                    asked,
                    asked + turn,
                )

    def _agreement(self, one: str, other: str) -> int:
        """How many characters two texts have in common at their start, no token of which is cut."""
        common = min(len(one), len(other))
        if one[:common] != other[:common]:
            pairs = zip(one, other, strict=False)
            common = next(index for index, (a, b) in enumerate(pairs) if a != b)
        # "<|im_start|>" and "</s>" begin alike, and are yet two different tokens.
        for text in (one, other):
            first = max(common - self._longest_token, 0)
            for token in self._tokens.finditer(text, first, common + self._longest_token):
                if token.start() < common < token.end():
                    return token.start()
        return common


def _turn_error(index: int, with_it: str, text: str) -> BadRowError:
    """What is wrong where a turn of the assistant's cannot be told apart."""
    last, amid = _from_difference(with_it, text)
    return BadRowError(
        "chat template",
        f"the assistant's words in turn {index + 1} cannot be told apart, because the template"
        f" writes {last!r} where nothing follows and {amid!r} where more does; use one that marks"
        " them with {% generation %} (data.chat_template)",
    )


def _prompt_error(why: str, asked: str, text: str) -> BadRowError:
    """What is wrong where a prompt and what is trained on do not begin alike."""
    given, trained = _from_difference(asked, text)
    if not why and "".join(text.split()).startswith("".join(asked.split())):
        why = "they differ in white space, as the indentation of a template's file makes it: "
    return BadRowError(
        "generation prompt",
        f"{why}generation is given {given!r}, and training has {trained!r}; the first must be how"
        " the second begins (data.chat_template)",
    )


def _from_difference(one: str, other: str) -> tuple[str, str]:
    """Two texts from a little before they differ: the first to its end, and as much of the other.

    Example:
      >>> _from_difference("Who? <think>", "Who? Ivy.")
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


def _before(messages: Messages, index: int) -> Wanted:
    """What asks for a turn; where nothing goes before it, another turn, which has its header."""
    if index:
        return Wanted(messages=messages[:index], generation_prompt=True)
    content = _other(_content(messages[0]))
    return Wanted(messages=[{**messages[0], "content": content}])


def _turns_of(messages: Messages) -> Iterator[int]:
    """The indices of the assistant's messages."""
    return (index for index, one in enumerate(messages) if one.get("role") == "assistant")


def _content(message: Mapping[str, Any]) -> str:
    """A message's text as a template may trim it."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _other(content: str) -> str:
    """A text that begins otherwise."""
    return "B" if content.startswith("A") else "A"


def _pieces(text: str, turns: Sequence[_Turn], learned: set[int]) -> tuple[Piece, ...]:
    """The text cut at the assistant's turns, some of which are learned."""
    pieces: list[Piece] = []
    done = 0
    for turn in turns:
        pieces.append(Piece(text=text[done : turn.start], learn=False))
        done = turn.start
        for start, stop in turn.learned if turn.message in learned else ():
            pieces += [
                Piece(text=text[done:start], learn=False, written=True),
                Piece(text=text[start:stop], learn=True),
            ]
            done = stop
        pieces.append(Piece(text=text[done : turn.stop], learn=False, written=True))
        done = turn.stop
    pieces.append(Piece(text=text[done:], learn=False))
    return tuple(piece for piece in pieces if piece.text)
