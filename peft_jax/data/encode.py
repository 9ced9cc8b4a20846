"""Text to tokens: what is learned, where prompt and answer meet, and what begins and ends them.

Three choices are made here, and hold for training, evaluation and generation alike.

*Where a prompt and its answer meet.* Text is tokenized as a whole, so that tokens are the ones that
the tokenizer makes of it. Where a token would reach across the border of a prompt and its answer,
the two are tokenized apart, because the model will be given the prompt alone: what it is trained to
continue is then exactly what it will be asked to continue. No character is lost or added either
way. An answer tokenized apart is put behind a short anchor whose tokens are then removed, so that
tokenizers that put a space before every text (SentencePiece's) put none before it. Where a token
reaches across the end of an answer that more text follows, as in a conversation, it stays whole and
is learned: it ends the answer.

*What begins a text.* Whatever the tokenizer itself puts before one: `<s>` for Llama, nothing for
Qwen or BLOOM. A chat template writes its own beginning, and nothing is added to it.

*What ends a text.* The tokenizer's end token, if it has one, learned with the answer, so that the
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
from peft_jax.data.control_tokens import ControlTokens
from peft_jax.data.examples import Conversation, Example, Piece, Span
from peft_jax.data.settings import TooLong

TOO_LONG = "too long"
"""The reason under which rows are counted that do not fit; it has a setting of its own."""

_ANCHORS = ("\n", ".", "a")
"""What an answer that is tokenized apart is put behind; the first that keeps to itself is used."""


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
        split_special_tokens: bool = False,
    ):
        """Finds out what the tokenizer puts before a text.

        Args:
          tokenizer: a transformers tokenizer.
          max_length: the most positions of a sequence, at least 1.
          completion_only: learn the pieces that are to be learned; otherwise every token.
          too_long: what to do with longer sequences; "skip" and "error" both raise `BadRowError`.
          renderer: what makes text of conversations; None: the tokenizer's chat template, looked
            for when the first conversation comes.
          split_special_tokens: tokenize control tokens in text that is not learned, or that a
            renderer calls plain, as the characters that they are.

        Raises:
          ValueError: if no position is left, or the tokenizer cannot split special tokens.
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
        self._control: ControlTokens | None = None
        if split_special_tokens:
            if not self._fast:
                raise ValueError(
                    "data.split_special_tokens is True, which needs a fast tokenizer, and"
                    f" {type(tokenizer).__name__} is none"
                )
            own = getattr(tokenizer, "chat_template", None) or ""
            templates = own.values() if isinstance(own, Mapping) else (own,)
            self._control = ControlTokens(tokenizer, templates)

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
            split = self._control is not None
            self._renderer = ChatRenderer(self.tokenizer, split_special_tokens=split)
        return self._renderer

    def encode(self, example: Example | Conversation) -> list[Encoded]:
        """The token sequences of an example: one, or several where a long one is split.

        Raises:
          BadRowError: if it is too long, or has no token to learn.
        """
        example = self.as_example(example)
        pieces = self._tokenize_pieces(example.pieces, self._plain(example))
        ids, learn = self._join(pieces, example)
        limit = self.max_length + 1
        if len(ids) <= limit:
            parts = [(ids, learn)]
        elif self.too_long == "truncate":
            parts = [(ids[:limit], learn[:limit])]
        elif self.too_long == "split":
            # Neighbors share a token: the last one predicted in one is the first read in the next.
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
        ids, _ = self._tokenize_pieces(example.before_answer, self._plain(example))
        return self._begin(ids, example)

    def choice_ids(self, example: Example) -> list[np.ndarray]:
        """For each choice, int32 [n], its tokens as they follow the prompt's."""
        prompt = self.prompt_ids(example)
        plain = self._plain(example)
        choices = []
        for choice in example.choices:
            last = Piece(text=choice, learn=True)
            pieces = (Piece(text=example.prompt, learn=False), last) if example.prompt else (last,)
            ids, _ = self._tokenize_pieces(pieces, plain)
            choices.append(self._begin(ids, example)[len(prompt) :])
        return choices

    def control_spans(self, text: str) -> tuple[Span, ...]:
        """Where others' text has control tokens that are tokenized as their characters."""
        return () if self._control is None else self._control.spans(text)

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

    def _plain(self, example: Example) -> tuple[Span, ...]:
        """Where a text has control tokens that are no more than their characters."""
        if self._control is None or example.templated:
            return example.plain
        spans: list[Span] = []
        done = 0
        for piece in example.pieces:
            found = () if piece.learn or piece.written else self.control_spans(piece.text)
            spans += [(done + start, done + stop) for start, stop in found]
            done += len(piece.text)
        return tuple(spans)

    def _tokenize_pieces(
        self, pieces: Sequence[Piece], plain: Sequence[Span]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a text, int32 [n], and which of them are learned, bool [n].

        Those before an answer depend on nothing that comes after: they are what a model is given.

        Args:
          pieces: the text.
          plain: where it has control tokens that are no more than their characters.
        """
        if not pieces:
            return np.zeros(0, np.int32), np.zeros(0, bool)
        if not self._fast or (len(pieces) == 1 and not plain):
            return self._tokenize_apart(pieces)
        groups = _groups(pieces)
        # Where an answer ends its text, only its beginning is to be found.
        located = any(len(group) > 1 for group in groups)
        runs = [_Run(begin=0, located=located)]
        for group in groups:
            run = runs[-1]
            longer = run.with_group(group, self._tokenize_run(run, group, plain))
            if not np.array_equal(longer.ids[: len(run.ids)], run.ids):
                # A token would reach across the border, or the prompt alone has other tokens.
                runs.append(_Run(begin=run.begin + len(run.text), located=located))
                longer = runs[-1].with_group(group, self._tokenize_run(runs[-1], group, plain))
            runs[-1] = longer
        return (
            np.concatenate([run.ids for run in runs]),
            np.concatenate([run.learn() for run in runs]),
        )

    def _tokenize_run(
        self, run: "_Run", group: Sequence[Piece], plain: Sequence[Span]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a run and more pieces, int32 [n], and where they begin in it, int64 [n]."""
        text = run.text + "".join(piece.text for piece in group)
        parts: list[tuple[int, int, bool]] = []
        done = 0
        for start, stop in ((a - run.begin, b - run.begin) for a, b in plain):
            if start >= 0 and stop <= len(text):
                parts += [(done, start, False), (start, stop, True)]
                done = stop
        parts.append((done, len(text), False))
        ids, starts = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for start, stop, as_text in parts:
            if start < stop:
                behind = run.begin + start > 0
                found = self._tokenize_part(
                    text[start:stop], behind=behind, as_text=as_text, located=run.located
                )
                ids.append(found[0])
                starts.append(found[1] + start)
        return np.concatenate(ids), np.concatenate(starts)

    def _tokenize_part(
        self, text: str, *, behind: bool, as_text: bool, located: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a text, int32 [n], and where they begin in it, int64 [n].

        Args:
          text: the text.
          behind: whether other text goes before it.
          as_text: whether it is a control token that is to be tokenized as its characters.
          located: whether it matters where the tokens begin; it costs as much as they do.

        Raises:
          BadRowError: if the tokenizer has no other token for it than the control token.
        """
        how = {"as_text": as_text, "located": located}
        ids, starts = self._tokenize_with_starts(text, **how)
        for anchor, alone in self._anchors.items() if behind else ():
            joint, begins = self._tokenize_with_starts(anchor + text, **how)
            if len(joint) > len(alone) and np.array_equal(joint[: len(alone)], alone):
                ids, starts = joint[len(alone) :], begins[len(alone) :] - len(anchor)
                break
        if as_text and not self.tokenizer.added_tokens_decoder.keys().isdisjoint(ids.tolist()):
            if len(text) == 1:
                raise BadRowError("control token", f"{text!r} has no other token than its own")
            # One that was added and is not special is found wherever it stands whole.
            first = self._tokenize_part(text[:1], behind=behind, **how)
            rest = self._tokenize_part(text[1:], behind=True, **how)
            return np.append(first[0], rest[0]), np.append(first[1], rest[1] + 1)
        return ids, starts

    def _tokenize_with_starts(
        self, text: str, *, as_text: bool, located: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=located,
            **({"split_special_tokens": True} if as_text else {}),
        )
        ids = np.array(encoded["input_ids"], np.int32)
        if not located:
            return ids, np.zeros(len(ids), np.int64)
        return ids, np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]

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
    """Pieces that are tokenized as one text.

    Attributes:
      begin: how many characters go before it.
      located: whether it matters where tokens begin.
      pieces: the pieces.
      ids: int32 [n], their tokens.
      starts: int64 [n], the first character of each, where it matters.
      answers: by piece, how many tokens go before it where it is an answer.
    """

    begin: int
    located: bool
    pieces: tuple[Piece, ...] = ()
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    starts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    answers: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """Their text."""
        return "".join(piece.text for piece in self.pieces)

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
        """Bool [n], the tokens that are learned."""
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
