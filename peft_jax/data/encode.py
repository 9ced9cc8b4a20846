"""Text to tokens: what is learnt, where prompt and answer meet, and what begins and ends them.

Three choices are made here, and hold for training, evaluation and generation alike.

*Where a prompt and its answer meet.* Text is tokenised as a whole, so that tokens are the ones that
the tokenizer makes of it. Where a token would reach across the border of a prompt and its answer,
the two are tokenised apart, because the model will be given the prompt alone: what it is trained to
continue is then exactly what it will be asked to continue. No character is lost or added either
way. An answer tokenised apart is put behind a short anchor whose tokens are then removed, so that
tokenizers that put a space before every text (SentencePiece's) put none before it. Where a token
reaches across the end of an answer that more text follows, as in a conversation, it stays whole and
is learnt: it ends the answer.

*What begins a text.* Whatever the tokenizer itself puts before one: `<s>` for Llama, nothing for
Qwen or BLOOM. A chat template writes its own beginning, and nothing is added to it.

*What ends a text.* The tokenizer's end token, if it has one, learnt with the answer, so that the
model learns to stop. A chat template writes its own ends.
"""

import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.chat import ChatRenderer
from peft_jax.data.examples import Conversation, Example, Piece
from peft_jax.data.settings import TooLong

TOO_LONG = "too long"
"""The reason under which rows are counted that do not fit; it has a setting of its own."""

_ANCHORS = ("\n", ".", "a")
"""What an answer that is tokenised apart is put behind; the first that keeps to itself is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sequence of tokens.

    Attributes:
      ids: int32 [n], the tokens.
      learn: bool [n], those that are to be predicted. The first never is.
      cut: Number of tokens that were cut off its end because they did not fit.
    """

    ids: np.ndarray
    learn: np.ndarray
    cut: int = 0

    @property
    def positions(self) -> int:
        """How many positions the sequence takes in a row: one for each token that is predicted."""
        return len(self.ids) - 1


class Encoder:
    """Makes token sequences of examples.

    Attributes:
      tokenizer: the transformers tokenizer.
      max_length: T, the most positions that a sequence takes. A sequence of n tokens takes n - 1,
        because its last token is predicted and not read.
      pad_id: what fills the rest of a row; the tokenizer's padding token, else its end token,
        else 0. No loss is taken there and nothing attends to it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        completion_only: bool = True,
        too_long: TooLong = "skip",
        renderer: ChatRenderer | None = None,
    ):
        """Finds out what the tokenizer puts before a text.

        Args:
          tokenizer: a transformers tokenizer.
          max_length: the most positions of a sequence, at least 1.
          completion_only: learn the pieces that are to be learnt; otherwise every token.
          too_long: what to do with longer sequences; "skip" and "error" both raise `BadRowError`.
          renderer: what makes text of conversations; None: the tokenizer's chat template, looked
            for when the first conversation comes.
        """
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.completion_only = completion_only
        self.too_long = too_long
        self._renderer = renderer
        self._prefix = _prefix_ids(tokenizer)
        self._anchors = {anchor: self._tokenize(anchor) for anchor in _ANCHORS}
        self._eos_id: int | None = tokenizer.eos_token_id
        if self._eos_id is None:
            logging.warning("The tokenizer has no end token: a model cannot learn where to stop.")
        pads = (tokenizer.pad_token_id, self._eos_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)
        self._fast = bool(getattr(tokenizer, "is_fast", False))

    def as_example(self, example: Example | Conversation) -> Example:
        """The example itself, or what the chat template makes of a conversation.

        Raises:
          BadRowError: if the template refuses the conversation.
        """
        if isinstance(example, Example):
            return example
        return self.renderer.render(example)

    @property
    def renderer(self) -> ChatRenderer:
        """What makes text of conversations."""
        if self._renderer is None:
            self._renderer = ChatRenderer(self.tokenizer)
        return self._renderer

    def encode(self, example: Example | Conversation) -> list[Encoded]:
        """The token sequences of an example: one, or several where a long one is split.

        Raises:
          BadRowError: if it is too long, or has no token to learn.
        """
        example = self.as_example(example)
        ids, learn = self._join(self._tokenize_pieces(example.pieces), example)
        limit = self.max_length + 1
        if len(ids) <= limit:
            parts = [(ids, learn)]
        elif self.too_long == "truncate":
            parts = [(ids[:limit], learn[:limit])]
        elif self.too_long == "split":
            # Neighbours share a token: the last one predicted in one is the first read in the next.
            starts = range(0, len(ids) - 1, self.max_length)
            parts = [(ids[start : start + limit], learn[start : start + limit]) for start in starts]
        else:
            detail = f"{len(ids)} tokens, and at most {limit} fit"
            raise BadRowError(TOO_LONG, detail, tokens=len(ids))
        cut = max(len(ids) - limit, 0) if self.too_long == "truncate" else 0
        kept = [Encoded(ids=part, learn=mask, cut=cut) for part, mask in parts if mask[1:].any()]
        if not kept and len(ids) > limit:
            detail = f"the first {limit} of {len(ids)} tokens hold no answer"
            raise BadRowError(TOO_LONG, detail, tokens=len(ids))
        if not kept:
            raise BadRowError("empty", "there is no token to learn")
        return kept

    def prompt_ids(self, example: Example) -> np.ndarray:
        """int32 [n], the tokens of an example's prompt as training shows them to the model."""
        ids, _ = self._tokenize_pieces(example.before_answer)
        return self._begin(ids, example)

    def choice_ids(self, example: Example) -> list[np.ndarray]:
        """For each choice, int32 [n], its tokens as they follow the prompt's."""
        prompt = self.prompt_ids(example)
        choices = []
        for choice in example.choices:
            last = Piece(text=choice, learn=True)
            pieces = (Piece(text=example.prompt, learn=False), last) if example.prompt else (last,)
            ids, _ = self._tokenize_pieces(pieces)
            choices.append(self._begin(ids, example)[len(prompt) :])
        return choices

    def lost_characters(self, example: Example | Conversation) -> set[str]:
        """The characters of an example that its tokens do not give back; white space aside."""
        text = "".join(piece.text for piece in self.as_example(example).pieces)
        kept = self.tokenizer.decode(self._tokenize(text))
        # A tokenizer may fold case or compose letters; that is not a loss.
        before, after = (unicodedata.normalize("NFKC", part).casefold() for part in (text, kept))
        return set("".join(before.split())) - set(after)

    def _join(
        self, pieces: tuple[np.ndarray, np.ndarray], example: Example
    ) -> tuple[np.ndarray, np.ndarray]:
        """Puts beginning and end around a text's tokens."""
        ids, learn = pieces
        joined = self._begin(ids, example)
        learn = np.concatenate([np.zeros(len(joined) - len(ids), bool), learn])
        ended = example.templated or (len(joined) and joined[-1] == self._eos_id)
        if self._eos_id is not None and not ended:
            joined = np.append(joined, np.int32(self._eos_id))
            learn = np.append(learn, True)
        if not self.completion_only:
            learn = np.ones(len(joined), bool)
        return joined, learn

    def _begin(self, ids: np.ndarray, example: Example) -> np.ndarray:
        """Puts the tokenizer's beginning before a text, unless the text has it."""
        prefix = self._prefix
        if example.templated or np.array_equal(ids[: len(prefix)], prefix):
            return ids
        return np.concatenate([prefix, ids])

    def _tokenize_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a text, int32 [n], and which of them are learnt, bool [n].

        Those before an answer depend on nothing that comes after: they are what a model is given.
        """
        if not pieces:
            return np.zeros(0, np.int32), np.zeros(0, bool)
        if not self._fast:
            return self._tokenize_apart(pieces)
        runs = [_Run(behind=False)]
        for group in _groups(pieces):
            run = runs[-1]
            longer = run.with_group(group, self._tokenize_run([*run.pieces, *group], run.behind))
            if not np.array_equal(longer.ids[: len(run.ids)], run.ids):
                # A token would reach across the border, or the prompt alone has other tokens.
                runs.append(_Run(behind=True))
                longer = runs[-1].with_group(group, self._tokenize_run(group, behind=True))
            runs[-1] = longer
        return (
            np.concatenate([run.ids for run in runs]),
            np.concatenate([run.learn() for run in runs]),
        )

    def _tokenize_run(self, pieces: Sequence[Piece], behind: bool) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of pieces as one text, int32 [n], and where they begin in it, int64 [n]."""
        text = "".join(piece.text for piece in pieces)
        for anchor, alone in self._anchors.items() if behind else ():
            ids, starts = self._tokenize_with_starts(anchor + text)
            if len(ids) > len(alone) and np.array_equal(ids[: len(alone)], alone):
                return ids[len(alone) :], starts[len(alone) :] - len(anchor)
        return self._tokenize_with_starts(text)

    def _tokenize_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        return np.array(encoded["input_ids"], np.int32), offsets[:, 0]

    def _tokenize_apart(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Each piece's tokens by themselves, one after the other."""
        parts = [
            self._tokenize_behind(piece.text) if index else self._tokenize(piece.text)
            for index, piece in enumerate(pieces)
        ]
        masks = [np.full(len(part), piece.learn) for part, piece in zip(parts, pieces, strict=True)]
        return np.concatenate(parts), np.concatenate(masks)

    def _tokenize_behind(self, text: str) -> np.ndarray:
        """A text's tokens as they follow other text, without a space that stands only before."""
        for anchor, alone in self._anchors.items():
            joint = self._tokenize(anchor + text)
            if len(joint) > len(alone) and np.array_equal(joint[: len(alone)], alone):
                return joint[len(alone) :]
        return self._tokenize(text)

    def _tokenize(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """Pieces that are tokenised as one text.

    Attributes:
      behind: whether other text goes before it.
      pieces: the pieces.
      ids: int32 [n], their tokens.
      starts: int64 [n], the first character of each.
      answers: by piece, how many tokens go before it where it is an answer.
    """

    behind: bool
    pieces: tuple[Piece, ...] = ()
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    starts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    answers: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def with_group(self, group: Sequence[Piece], tokens: tuple[np.ndarray, np.ndarray]) -> "_Run":
        """The run with more pieces, whose first is an answer if there are any before it."""
        ids, starts = tokens
        return dataclasses.replace(
            self,
            pieces=(*self.pieces, *group),
            ids=ids,
            starts=starts,
            answers={**self.answers, len(self.pieces): len(self.ids)},
        )

    def learn(self) -> np.ndarray:
        """Bool [n], the tokens that are learnt."""
        learn = np.zeros(len(self.ids), bool)
        border = 0
        begins = []
        for index, piece in enumerate(self.pieces):
            # A token that reaches across an answer's end is the answer's.
            first = np.searchsorted(self.starts, border, side="left")
            begins.append(self.answers.get(index, int(first)))
            border += len(piece.text)
        for piece, begin, end in zip(
            self.pieces, begins, [*begins[1:], len(self.ids)], strict=True
        ):
            learn[begin:end] = piece.learn
        return learn


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces, each answer with what follows it up to the next."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        follows = bool(groups) and (groups[-1][-1].learn or groups[-1][-1].written)
        begins = (piece.learn or piece.written) and not follows
        if begins or not groups:
            groups.append([])
        groups[-1].append(piece)
    return groups


def _prefix_ids(tokenizer: Any) -> np.ndarray:
    """int32 [n], what the tokenizer puts before a text: its begin token, or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return np.array(whole[:start], np.int32)
    return np.zeros(0, np.int32)
