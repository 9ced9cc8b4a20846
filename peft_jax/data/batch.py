"""Batches of training or evaluation rows, as arrays of fixed shape."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from flax import struct
from numpy.typing import ArrayLike


@struct.dataclass
class Batch:
    """Rows of tokens with a loss mask; a pytree.

    Axes: B rows, T positions. The data pipeline yields numpy arrays. Transformations may replace
    them (by device arrays, shape structs, shardings).

    Attributes:
      tokens: Int32 [B, T], input tokens.
      targets: Int32 [B, T], the token that follows each position.
      loss_mask: Float32 [B, T], 1 where the target is in the loss, else 0.
      positions: Int32 [B, T], position within the segment, from 0.
      segment_ids: Int32 [B, T], 1, 2, ... for the sequences packed into a row, 0 for padding.
    """

    row_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of shape [B]."""
    float_fields: ClassVar[tuple[str, ...]] = ("loss_mask",)
    """Fields of dtype float32; the others are int32."""

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
        """Builds a batch with one sequence per row.

        Args:
          tokens: Integers [B, T]; token t + 1 is the target at position t.
          mask: [B, T]; nonzero where a token is in the loss; all tokens by default. The first token
            of a row is never in the loss, since nothing precedes it.
          lengths: [B]; number of tokens of each row, followed by padding; T by default.

        Raises:
          ValueError: The shapes do not match, a length is not between 1 and T, or a token is
            negative.

        Example:
          >>> batch = Batch.from_tokens([[5, 6, 7, 0]], mask=[[0, 0, 1, 1]], lengths=[3])
          >>> batch.targets.tolist(), batch.loss_mask.tolist(), batch.segment_ids.tolist()
          ([[6, 7, 0, 0]], [[0.0, 1.0, 0.0, 0.0]], [[1, 1, 1, 0]])
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                "tokens must be integers [rows, positions], at least one of each, but are"
                f" {tokens.dtype}{list(tokens.shape)}"
            )
        rows, length = tokens.shape
        in_loss = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask) != 0
        if in_loss.shape != tokens.shape:
            raise ValueError(
                f"mask must have the shape of tokens, {list(tokens.shape)}, but has"
                f" {list(in_loss.shape)}"
            )
        ends = np.full(rows, length) if lengths is None else np.asarray(lengths)
        if ends.shape != (rows,) or not (ends.min() >= 1 and ends.max() <= length):
            raise ValueError(
                f"lengths must be {rows} numbers from 1 to {length}, but are {ends.tolist()}"
            )
        present = np.arange(length) < ends[:, None]
        # Padding may hold any value (such as -100), which need not be a token of the model.
        tokens = np.where(present, tokens, 0)
        if tokens.min() < 0:
            raise ValueError(
                f"tokens must be at least 0, but one is {tokens.min()}; mark padding by `lengths`,"
                " and tokens that are not in the loss by `mask`"
            )
        following = np.pad(in_loss & present, ((0, 0), (0, 1)))[:, 1:]
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
    """Rows of one text or one pair of texts, each with a label; a pytree.

    Axes and kinds of arrays are those of `Batch`.

    Attributes:
      tokens: Int32 [B, T], with the tokenizer's special tokens.
      token_types: Int32 [B, T], 1 for the second text of a pair if the tokenizer has types.
      segment_ids: Int32 [B, T], 1 for tokens, 0 for padding.
      labels: Float32 [B], index of the label or, in a regression, the number.
      loss_mask: Float32 [B], 1 for rows, 0 for padding of the last batch.
    """

    row_fields: ClassVar[tuple[str, ...]] = ("labels", "loss_mask")
    float_fields: ClassVar[tuple[str, ...]] = ("labels", "loss_mask")

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
    """Returns the shapes and dtypes of a batch, as `jax.ShapeDtypeStruct`s.

    Args:
      kind: `Batch` or `LabeledBatch`.
      leading: Sizes of the axes before the positions: (rows,) or (microbatches, rows).
      length: T.
      sharding: Sharding of every array.

    Example:
      >>> abstract_batch(LabeledBatch, (4,), 16).labels
      ShapeDtypeStruct(shape=(4,), dtype=float32)
    """
    return kind(
        **{
            field.name: jax.ShapeDtypeStruct(
                leading if field.name in kind.row_fields else (*leading, length),
                np.float32 if field.name in kind.float_fields else np.int32,
                sharding=sharding,
            )
            for field in dataclasses.fields(kind)
        }
    )


def padding_share(batch: AnyBatch) -> float:
    """Returns the share of a batch's positions that are padding, from 0 to 1.

    Example:
      >>> row = np.array([[1, 1, 2, 0]], np.int32)
      >>> padding_share(Batch(row, row, row, row, segment_ids=row))
      0.25
    """
    segments = np.asarray(batch.segment_ids)
    return float(np.count_nonzero(segments == 0) / max(segments.size, 1))
