"""Tokenizes examples and computes their loss masks.

Three rules hold for training, evaluation and generation alike.

*Border between prompt and answer.* Text is tokenized as a whole. If a token would cross the
border, prompt and answer are tokenized separately, because generation gets the prompt alone. So
the prompt's tokens are the same in training and generation, and no character is lost or added. An
answer that is tokenized separately is put after a short anchor, whose tokens are then removed. This
keeps tokenizers that add a space before every text (SentencePiece) from adding one. If more text
follows an answer, as in a conversation, a token that crosses the answer's end stays whole and is in
the loss.

*Beginning of a text.* The tokenizer's own prefix: `<s>` for Llama, nothing for Qwen or BLOOM. A
chat template writes its own beginning.

*End of a text.* The tokenizer's end token, if it has one. It is in the loss, so that the model
learns to stop. A chat template writes its own end.
"""

import dataclasses
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.chat import ChatRenderer
from peft_jax.data.control_tokens import ControlTokens
from peft_jax.data.examples import Conversation, Example, Piece, Span
from peft_jax.data.settings import TooLong

_log = logging.getLogger(__name__)

TOO_LONG = "too long"
"""Reason of rows that do not fit; they have their own setting, `data.too_long`."""

_ANCHORS = ("\n", ".", "a")
"""Anchors before a separately tokenized answer; the first that merges with no token is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sequence of tokens.

    Attributes:
      ids: Int32 [n], tokens.
      loss_mask: Bool [n], tokens in the loss. The first is never predicted.
      truncated: Number of tokens that were truncated at the end.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    truncated: int = 0

    @property
    def positions(self) -> int:
        """Number of positions that the sequence takes in a row: one per predicted token."""
        return len(self.ids) - 1


class Encoder:
    """Encodes examples as token sequences.

    Attributes:
      tokenizer: The transformers tokenizer.
      max_length: T, largest number of positions per sequence. A sequence of n tokens takes n - 1,
        because its last token is only predicted.
      pad_id: Padding token: the tokenizer's padding token, else its end token, else 0. Padding is
        not in the loss, and nothing attends to it.
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
        """Detects the tokenizer's prefix and special tokens.

        Args:
          tokenizer: A transformers tokenizer.
          max_length: Largest number of positions per sequence, at least 1.
          completion_only: Whether only the answers' tokens are in the loss; otherwise all tokens.
          too_long: Treatment of longer sequences; "skip" and "error" both raise `BadRowError`.
          renderer: Renderer of conversations; None: the tokenizer's chat template, loaded with the
            first conversation.
          split_special_tokens: Whether control tokens in prompts, or in spans that a renderer marks
            as plain, are tokenized as characters.

        Raises:
          ValueError: `max_length` is below 1, or the tokenizer cannot split special tokens.
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
            _log.warning("The tokenizer has no end token: a model cannot learn where to stop.")
        pads = (tokenizer.pad_token_id, self._eos_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        self._control: ControlTokens | None = None
        if split_special_tokens:
            if not self._fast:
                raise ValueError(
                    "data.split_special_tokens is True, which needs a fast tokenizer, but the"
                    f" tokenizer is a {type(tokenizer).__name__}"
                )
            own = getattr(tokenizer, "chat_template", None) or ""
            templates = own.values() if isinstance(own, Mapping) else (own,)
            self._control = ControlTokens(tokenizer, templates)

    def as_example(self, example: Example | Conversation) -> Example:
        """Returns an example unchanged, or renders a conversation.

        Raises:
          BadRowError: The template rejects the conversation.
        """
        if isinstance(example, Example):
            return example
        return self.renderer.render(example)

    @property
    def renderer(self) -> ChatRenderer:
        """Renderer of conversations."""
        if self._renderer is None:
            split = self._control is not None
            self._renderer = ChatRenderer(self.tokenizer, split_special_tokens=split)
        return self._renderer

    def encode(self, example: Example | Conversation) -> list[Encoded]:
        """Returns the token sequences of an example; several if a long one is split.

        Raises:
          BadRowError: The example is too long, or has no token in the loss.
        """
        example = self.as_example(example)
        pieces = self._tokenize_pieces(example.pieces, self._plain(example))
        ids, mask = self._join(pieces, example)
        limit = self.max_length + 1
        if len(ids) <= limit:
            parts = [(ids, mask)]
        elif self.too_long == "truncate":
            parts = [(ids[:limit], mask[:limit])]
        elif self.too_long == "split":
            # The last predicted token of a sequence is the first input of the next.
            starts = range(0, len(ids) - 1, self.max_length)
            parts = [(ids[start : start + limit], mask[start : start + limit]) for start in starts]
        else:
            detail = f"{len(ids)} tokens, but at most {limit} fit"
            raise BadRowError(TOO_LONG, detail, tokens=len(ids))
        truncated = max(len(ids) - limit, 0) if self.too_long == "truncate" else 0
        kept = [
            Encoded(ids=part, loss_mask=mask, truncated=truncated)
            for part, mask in parts
            if mask[1:].any()
        ]
        if not kept and len(ids) > limit:
            detail = f"the first {limit} of {len(ids)} tokens hold no answer"
            raise BadRowError(TOO_LONG, detail, tokens=len(ids))
        if not kept:
            raise BadRowError("empty", "there is no token in the loss")
        return kept

    def prompt_ids(self, example: Example) -> np.ndarray:
        """Returns int32 [n], the tokens of an example's prompt, as in training."""
        ids, _ = self._tokenize_pieces(example.before_answer, self._plain(example))
        return self._begin(ids, example)

    def choice_ids(self, example: Example) -> list[np.ndarray]:
        """Returns for each choice int32 [n], its tokens after the prompt."""
        prompt = self.prompt_ids(example)
        plain = self._plain(example)
        choices = []
        for choice in example.choices:
            last = Piece(text=choice, in_loss=True)
            pieces = (
                (Piece(text=example.prompt, in_loss=False), last) if example.prompt else (last,)
            )
            ids, _ = self._tokenize_pieces(pieces, plain)
            choices.append(self._begin(ids, example)[len(prompt) :])
        return choices

    def control_spans(self, text: str) -> tuple[Span, ...]:
        """Returns the spans of control tokens in a prompt that are tokenized as characters."""
        return () if self._control is None else self._control.spans(text)

    def lost_characters(self, example: Example | Conversation) -> set[str]:
        """Returns the characters, except white space, that are lost by tokenization."""
        text = "".join(piece.text for piece in self.as_example(example).pieces)
        kept = self.tokenizer.decode(self._tokenize(text))
        # Folding case or composing letters loses no character.
        before, after = (unicodedata.normalize("NFKC", part).casefold() for part in (text, kept))
        return set("".join(before.split())) - set(after)

    def _join(
        self, pieces: tuple[np.ndarray, np.ndarray], example: Example
    ) -> tuple[np.ndarray, np.ndarray]:
        """Adds the beginning and the end to a text's tokens."""
        ids, mask = pieces
        joined = self._begin(ids, example)
        mask = np.concatenate([np.zeros(len(joined) - len(ids), bool), mask])
        ended = example.templated or (len(joined) and joined[-1] == self._eos_id)
        if self._eos_id is not None and not ended:
            joined = np.append(joined, np.int32(self._eos_id))
            mask = np.append(mask, True)
        if not self.completion_only:
            mask = np.ones(len(joined), bool)
        return joined, mask

    def _begin(self, ids: np.ndarray, example: Example) -> np.ndarray:
        """Adds the tokenizer's prefix to a text, unless it is there already."""
        prefix = self._prefix
        if example.templated or np.array_equal(ids[: len(prefix)], prefix):
            return ids
        return np.concatenate([prefix, ids])

    def _plain(self, example: Example) -> tuple[Span, ...]:
        """Returns the spans of control tokens that are tokenized as characters."""
        if self._control is None or example.templated:
            return example.plain
        spans: list[Span] = []
        done = 0
        for piece in example.pieces:
            found = () if piece.in_loss or piece.generated else self.control_spans(piece.text)
            spans += [(done + start, done + stop) for start, stop in found]
            done += len(piece.text)
        return tuple(spans)

    def _tokenize_pieces(
        self, pieces: Sequence[Piece], plain: Sequence[Span]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of a text, int32 [n], and its loss mask, bool [n].

        The tokens of a prompt do not depend on the answer, so that generation gets the same ones.

        Args:
          pieces: Pieces of the text.
          plain: Spans of control tokens that are tokenized as characters.
        """
        if not pieces:
            return np.zeros(0, np.int32), np.zeros(0, bool)
        if not self._fast or (len(pieces) == 1 and not plain):
            return self._tokenize_separately(pieces)
        groups = _groups(pieces)
        # If the answer ends the text, only its start must be located.
        located = any(len(group) > 1 for group in groups)
        runs = [_Run(begin=0, located=located)]
        for group in groups:
            run = runs[-1]
            longer = run.with_group(group, self._tokenize_run(run, group, plain))
            if not np.array_equal(longer.ids[: len(run.ids)], run.ids):
                # A token would cross the border, or the prompt alone has other tokens.
                runs.append(_Run(begin=run.begin + len(run.text), located=located))
                longer = runs[-1].with_group(group, self._tokenize_run(runs[-1], group, plain))
            runs[-1] = longer
        return (
            np.concatenate([run.ids for run in runs]),
            np.concatenate([run.loss_mask() for run in runs]),
        )

    def _tokenize_run(
        self, run: "_Run", group: Sequence[Piece], plain: Sequence[Span]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes a run with more pieces: tokens int32 [n], and their starts int64 [n]."""
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
                after_text = run.begin + start > 0
                found = self._tokenize_part(
                    text[start:stop], after_text=after_text, as_text=as_text, located=run.located
                )
                ids.append(found[0])
                starts.append(found[1] + start)
        return np.concatenate(ids), np.concatenate(starts)

    def _tokenize_part(
        self, text: str, *, after_text: bool, as_text: bool, located: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes a text: tokens int32 [n], and their starts in it int64 [n].

        Args:
          text: Text.
          after_text: Whether other text precedes it.
          as_text: Whether it is a control token to be tokenized as characters.
          located: Whether the starts are needed, which doubles the cost.

        Raises:
          BadRowError: The tokenizer has no token for the text except the control token.
        """
        how = {"as_text": as_text, "located": located}
        ids, starts = self._tokenize_with_starts(text, **how)
        for anchor, alone in self._anchors.items() if after_text else ():
            joint, begins = self._tokenize_with_starts(anchor + text, **how)
            if len(joint) > len(alone) and np.array_equal(joint[: len(alone)], alone):
                ids, starts = joint[len(alone) :], begins[len(alone) :] - len(anchor)
                break
        if as_text and not self.tokenizer.added_tokens_decoder.keys().isdisjoint(ids.tolist()):
            if len(text) == 1:
                raise BadRowError("control token", f"{text!r} cannot be split into other tokens")
                # Tokenizers split only special tokens, so an added token is split here.
            first = self._tokenize_part(text[:1], after_text=after_text, **how)
            rest = self._tokenize_part(text[1:], after_text=True, **how)
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

    def _tokenize_separately(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes each piece separately, and concatenates tokens and loss masks."""
        parts = [
            self._tokenize_after_text(piece.text) if index else self._tokenize(piece.text)
            for index, piece in enumerate(pieces)
        ]
        masks = [
            np.full(len(part), piece.in_loss) for part, piece in zip(parts, pieces, strict=True)
        ]
        return np.concatenate(parts), np.concatenate(masks)

    def _tokenize_after_text(self, text: str) -> np.ndarray:
        """Tokenizes a text that follows other text, without a space added in front."""
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
      begin: Number of characters before the run.
      located: Whether the starts of tokens are needed.
      pieces: Pieces of the run.
      ids: Int32 [n], tokens.
      starts: Int64 [n], first character of each token, if needed.
      answers: Number of tokens before each answer, by the index of its piece.
    """

    begin: int
    located: bool
    pieces: tuple[Piece, ...] = ()
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    starts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    answers: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """Text of the run."""
        return "".join(piece.text for piece in self.pieces)

    def with_group(self, group: Sequence[Piece], tokens: tuple[np.ndarray, np.ndarray]) -> "_Run":
        """Returns the run with more pieces; the first is an answer, unless the run is empty."""
        ids, starts = tokens
        return dataclasses.replace(
            self,
            pieces=(*self.pieces, *group),
            ids=ids,
            starts=starts,
            answers={**self.answers, len(self.pieces): len(self.ids)},
        )

    def loss_mask(self) -> np.ndarray:
        """Returns bool [n], the loss mask."""
        mask = np.zeros(len(self.ids), bool)
        border = 0
        begins = []
        for index, piece in enumerate(self.pieces):
            # A token that crosses the end of an answer belongs to the answer.
            first = np.searchsorted(self.starts, border, side="left")
            begins.append(self.answers.get(index, int(first)))
            border += len(piece.text)
        for piece, begin, end in zip(
            self.pieces, begins, [*begins[1:], len(self.ids)], strict=True
        ):
            mask[begin:end] = piece.in_loss
        return mask


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Groups pieces so that each group starts with an answer, except perhaps the first."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        follows = bool(groups) and (groups[-1][-1].in_loss or groups[-1][-1].generated)
        begins = (piece.in_loss or piece.generated) and not follows
        if begins or not groups:
            groups.append([])
        groups[-1].append(piece)
    return groups


def _prefix_ids(tokenizer: Any) -> np.ndarray:
    """Returns int32 [n], the tokenizer's prefix of a text: its begin token, or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return np.array(whole[:start], np.int32)
    return np.zeros(0, np.int32)
