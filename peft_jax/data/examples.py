"""What a recipe makes of a row: text with a part to be learned, or a conversation."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

Span = tuple[int, int]
"""The first character of a stretch of text, and one past its last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text that is learned, or is not.

    Attributes:
      text: the text.
      learn: whether the loss is taken on its tokens.
      written: whether a model writes it although it is not learned, as an earlier turn of the
        assistant's; what goes before it is a prompt, and is tokenized as one.
    """

    text: str
    learn: bool
    written: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row as text: what the model is shown and what it is to say.

    Attributes:
      pieces: the whole text in order; the answer that is evaluated is the last one that is learned,
        with what is written around it.
      answer: the reference that a prediction is scored against ("positive", "72").
      choices: for a classification, every label's text as it would continue the prompt, with its
        leading space, in the order of the labels.
      label: the index of the right one among `choices`.
      value: for a regression, the right number.
      sentences: for a classification or regression, the texts an encoder reads in the prompt's
        place.
      templated: whether a chat template wrote the text, so that it holds its own special tokens
        and none are added.
      plain: where a templated text has control tokens that are no more than their characters.
    """

    pieces: tuple[Piece, ...]
    answer: str = ""
    choices: tuple[str, ...] = ()
    label: int | None = None
    value: float | None = None
    sentences: tuple[str, ...] = ()
    templated: bool = False
    plain: tuple[Span, ...] = ()

    @property
    def prompt(self) -> str:
        """The text before the answer."""
        return "".join(piece.text for piece in self.before_answer)

    @property
    def completion(self) -> str:
        """The answer."""
        begun = itertools.takewhile(_is_written, self.pieces[len(self.before_answer) :])
        return "".join(piece.text for piece in begun)

    @property
    def before_answer(self) -> tuple[Piece, ...]:
        """The pieces before the answer."""
        last = max(index for index, piece in enumerate(self.pieces) if piece.learn)
        while last and _is_written(self.pieces[last - 1]):
            last -= 1
        return self.pieces[:last]


def _is_written(piece: Piece) -> bool:
    return piece.learn or piece.written


def prompt_and_completion(prompt: str, completion: str, **others: Any) -> Example:
    """An example of a prompt that is not learned and an answer that is.

    Args:
      prompt: the prompt; it may be empty.
      completion: the answer, with the space that parts it from the prompt.
      **others: the further fields of `Example`.

    Example:
      >>> example = prompt_and_completion("Sentiment:", " positive", answer="positive")
      >>> example.prompt, example.completion
      ('Sentiment:', ' positive')
    """
    pieces = (Piece(text=prompt, learn=False),) if prompt else ()
    return Example(pieces=(*pieces, Piece(text=completion, learn=True)), **others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages that a chat template turns into an `Example`.

    Attributes:
      messages: as `apply_chat_template` takes them: dictionaries with "role" and "content".
      tools: the tools the conversation may call, as `apply_chat_template` takes them.
      learned: the assistant's messages that are learned, by their indices; None: every one of them.
      answer: as in `Example`.
      choices: as in `Example`.
      label: as in `Example`.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    learned: tuple[int, ...] | None = None
    answer: str = ""
    choices: tuple[str, ...] = ()
    label: int | None = None
