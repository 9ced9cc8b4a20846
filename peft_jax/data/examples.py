"""Examples that recipes make of rows: text with a loss mask, or a conversation."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

Span = tuple[int, int]
"""Start and stop of a range of characters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of text that is in the loss, or is not.

    Attributes:
      text: Text.
      in_loss: Whether the tokens are in the loss.
      generated: Whether a model generates the text although it is not in the loss, as in an earlier
        turn of the assistant. The text before it is a prompt and is tokenized as one.
    """

    text: str
    in_loss: bool
    generated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A row as text: a prompt and an answer.

    Attributes:
      pieces: The whole text, in order. The answer is the last piece in the loss, with the
        generated pieces around it.
      answer: Reference that a prediction is scored against ("positive", "72").
      choices: For a classification, the continuation of the prompt for each label, with its leading
        space, in the order of labels.
      label: Index of the correct choice.
      value: For a regression, the correct number.
      sentences: For a classification or regression, the texts that an encoder reads instead of the
        prompt.
      templated: Whether a chat template rendered the text. It then has its own special tokens, and
        none are added.
      plain: Spans of control tokens in a templated text that are tokenized as characters.
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
        """Text before the answer."""
        return "".join(piece.text for piece in self.before_answer)

    @property
    def completion(self) -> str:
        """Text of the answer."""
        begun = itertools.takewhile(_is_written, self.pieces[len(self.before_answer) :])
        return "".join(piece.text for piece in begun)

    @property
    def before_answer(self) -> tuple[Piece, ...]:
        """Pieces before the answer."""
        last = max(index for index, piece in enumerate(self.pieces) if piece.in_loss)
        while last and _is_written(self.pieces[last - 1]):
            last -= 1
        return self.pieces[:last]


def _is_written(piece: Piece) -> bool:
    return piece.in_loss or piece.generated


def prompt_and_completion(prompt: str, completion: str, **others: Any) -> Example:
    """Returns an example of a prompt, and an answer whose tokens are in the loss.

    Args:
      prompt: Prompt; may be empty.
      completion: Answer, with the space that separates it from the prompt.
      **others: Other fields of `Example`.

    Example:
      >>> example = prompt_and_completion("Sentiment:", " positive", answer="positive")
      >>> example.prompt, example.completion
      ('Sentiment:', ' positive')
    """
    pieces = (Piece(text=prompt, in_loss=False),) if prompt else ()
    return Example(pieces=(*pieces, Piece(text=completion, in_loss=True)), **others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages that a chat template renders as an `Example`.

    Attributes:
      messages: Messages in the format of `apply_chat_template`: dictionaries with "role" and
        "content".
      tools: Tools that the conversation may call, in the format of `apply_chat_template`.
      loss_turns: Indices of the assistant's messages in the loss; None: all of them.
      answer: See `Example`.
      choices: See `Example`.
      label: See `Example`.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    loss_turns: tuple[int, ...] | None = None
    answer: str = ""
    choices: tuple[str, ...] = ()
    label: int | None = None
