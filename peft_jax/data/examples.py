"""What a recipe makes of a row: text with a part to be learnt, or a conversation."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text that is learnt, or is not.

    Attributes:
      text: the text.
      learn: whether the loss is taken on its tokens.
    """

    text: str
    learn: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row as text: what the model is shown and what it is to say.

    Attributes:
      pieces: the whole text in order; the last learnt piece is the answer that is evaluated.
      answer: the reference that a prediction is scored against ("positive", "72").
      choices: for a classification, every label's text as it would continue the prompt, with its
        leading space, in the order of the labels.
      label: the index of the right one among `choices`.
      value: for a regression, the right number.
      sentences: for a classification or regression, the texts an encoder reads in the prompt's
        place.
      templated: whether a chat template wrote the text, so that it holds its own special tokens
        and none are added.
    """

    pieces: tuple[Piece, ...]
    answer: str = ""
    choices: tuple[str, ...] = ()
    label: int | None = None
    value: float | None = None
    sentences: tuple[str, ...] = ()
    templated: bool = False

    @property
    def prompt(self) -> str:
        """The text before the last learnt piece."""
        return "".join(piece.text for piece in self.pieces[: self._last_learnt])

    @property
    def completion(self) -> str:
        """The last learnt piece."""
        return self.pieces[self._last_learnt].text

    @property
    def _last_learnt(self) -> int:
        return max(index for index, piece in enumerate(self.pieces) if piece.learn)


def prompt_and_completion(prompt: str, completion: str, **others: Any) -> Example:
    """An example of a prompt that is not learnt and an answer that is.

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
      answer: as in `Example`.
      choices: as in `Example`.
      label: as in `Example`.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    answer: str = ""
    choices: tuple[str, ...] = ()
    label: int | None = None
