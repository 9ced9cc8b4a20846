"""One batch of training or evaluation, as arrays of fixed shape."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from flax import struct


@struct.dataclass
class Batch:
    """Token rows with what is to be learnt of them; a pytree.

    Axes: B rows, T positions. The fields are numpy arrays as the data pipeline yields them, and
    whatever a transformation makes of them afterwards (device arrays, shape structs, shardings).

    Attributes:
      tokens: int32 [B, T], what the model reads.
      targets: int32 [B, T], the token that follows each position.
      loss_mask: float32 [B, T], 1 where the target is to be learnt, else 0.
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


@struct.dataclass
class LabelledBatch:
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


AnyBatch = Batch | LabelledBatch


def abstract_batch(
    kind: type[Batch] | type[LabelledBatch],
    leading: tuple[int, ...],
    length: int,
    sharding: jax.sharding.Sharding | None = None,
) -> Any:
    """The shapes and dtypes of a batch.

    Args:
      kind: `Batch` or `LabelledBatch`.
      leading: the axes before the positions: (rows,) or (microbatches, rows).
      length: T.
      sharding: of every array.

    Example:
      >>> abstract_batch(LabelledBatch, (4,), 16).labels
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
