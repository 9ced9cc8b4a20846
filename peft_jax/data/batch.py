"""One batch of training or evaluation, as arrays of fixed shape."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from flax import struct
from numpy.typing import ArrayLike


@struct.dataclass
class Batch:
    """Token rows with what is to be learned of them; a pytree.

    Axes: B rows, T positions. The fields are numpy arrays as the data pipeline yields them, and
    whatever a transformation makes of them afterwards (device arrays, shape structs, shardings).

    Attributes:
      tokens: int32 [B, T], what the model reads.
      targets: int32 [B, T], the token that follows each position.
      loss_mask: float32 [B, T], 1 where the target is to be learned, else 0.
      positions: int32 [B, T], the position within its own segment, from 0.
      segment_ids: int32 [B, T], 1, 2, ... for the sequences packed into a row, 0 for padding.
    """

    of_rows: ClassVar[tuple[str, ...]] = ()
    """The fields with an axis of rows only."""
    floats: ClassVar[tuple[str, ...]] = ("loss_mask",)
    """The fields of float32; the others are int32."""

    tokens: Any
    targets: Any
    loss_mask: Any
    positions: Any
    segment_ids: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens.shape

    @staticmethod
    def from_tokens(
        tokens: ArrayLike, mask: ArrayLike | None = None, lengths: ArrayLike | None = None
    ) -> "Batch":
        """Makes a batch whose rows hold one sequence each.

        Args:
          tokens: [B, T] whole numbers; token t + 1 is the target at position t.
          mask: [B, T]; nonzero where a token is to be learned. All are by default. The first token
            of a row is never learned, since nothing precedes it.
          lengths: [B]; number of tokens of each row, padding following them. T by default.

        Raises:
          ValueError: the shapes do not agree, a length is not between 1 and T, or a token is
            negative.

        Example:
          >>> batch = Batch.from_tokens([[5, 6, 7, 0]], mask=[[0, 0, 1, 1]], lengths=[3])
          >>> batch.targets.tolist(), batch.loss_mask.tolist(), batch.segment_ids.tolist()
          ([[6, 7, 0, 0]], [[0.0, 1.0, 0.0, 0.0]], [[1, 1, 1, 0]])
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                "tokens must be whole numbers [rows, positions], at least one of each, but are"
                f" {tokens.dtype}{list(tokens.shape)}"
            )
        rows, length = tokens.shape
        learned = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask) != 0
        if learned.shape != tokens.shape:
            raise ValueError(
                f"mask must have the shape of tokens, {list(tokens.shape)}, but has"
                f" {list(learned.shape)}"
            )
        ends = np.full(rows, length) if lengths is None else np.asarray(lengths)
        if ends.shape != (rows,) or not (ends.min() >= 1 and ends.max() <= length):
            raise ValueError(
                f"lengths must be {rows} numbers from 1 to {length}, but are {ends.tolist()}"
            )
        present = np.arange(length) < ends[:, None]
        # Whatever stands in the padding (-100, say) may be no token of the model's.
        tokens = np.where(present, tokens, 0)
        if tokens.min() < 0:
            raise ValueError(
                f"tokens must be at least 0, but one is {tokens.min()}; `lengths` marks padding,"
                " and `mask` what is not to be learned"
            )
        following = np.pad(learned & present, ((0, 0), (0, 1)))[:, 1:]
        positions = np.where(present, np.arange(length), 0)
        return Batch(
            tokens=tokens.astype(np.int32),
            targets=np.pad(tokens, ((0, 0), (0, 1)))[:, 1:].astype(np.int32),
            loss_mask=following.astype(np.float32),
            positions=positions.astype(np.int32),
            segment_ids=present.astype(np.int32),
        )


@struct.dataclass
class LabeledBatch:
    """Rows of one text, or one pair of texts, each with a label; a pytree.

    Axes and kinds of arrays as for `Batch`.

    Attributes:
      tokens: int32 [B, T], with the tokenizer's own beginning, separator and end.
      token_types: int32 [B, T], 1 for the second text of a pair where the tokenizer says so.
      segment_ids: int32 [B, T], 1 where there is a token, 0 for padding.
      labels: float32 [B], the number of the label or, in a regression, the number itself.
      loss_mask: float32 [B], 1 where there is a row, 0 for what fills up the last batch.
    """

    of_rows: ClassVar[tuple[str, ...]] = ("labels", "loss_mask")
    floats: ClassVar[tuple[str, ...]] = ("labels", "loss_mask")

    tokens: Any
    token_types: Any
    segment_ids: Any
    labels: Any
    loss_mask: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens.shape


AnyBatch = Batch | LabeledBatch


def abstract_batch(
    kind: type[Batch] | type[LabeledBatch],
    leading: tuple[int, ...],
    length: int,
    sharding: jax.sharding.Sharding | None = None,
) -> Any:
    """The shapes and dtypes of a batch.

    Args:
      kind: `Batch` or `LabeledBatch`.
      leading: the axes before the positions: (rows,) or (microbatches, rows).
      length: T.
      sharding: of every array.

    Example:
      >>> abstract_batch(LabeledBatch, (4,), 16).labels
      ShapeDtypeStruct(shape=(4,), dtype=float32)
    """
    return kind(
        **{
            field.name: jax.ShapeDtypeStruct(
                leading if field.name in kind.of_rows else (*leading, length),
                np.float32 if field.name in kind.floats else np.int32,
                sharding=sharding,
            )
            for field in dataclasses.fields(kind)
        }
    )


def padding_share(batch: AnyBatch) -> float:
    """The share of a batch's positions that hold no token, from 0 to 1.

    Example:
      >>> row = np.array([[1, 1, 2, 0]], np.int32)
      >>> padding_share(Batch(row, row, row, row, segment_ids=row))
      0.25
    """
    segments = np.asarray(batch.segment_ids)
    return float(np.count_nonzero(segments == 0) / max(segments.size, 1))
