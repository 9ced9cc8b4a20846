"""One batch of training or evaluation, as arrays of fixed shape."""

from typing import Any

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

    tokens: Any
    targets: Any
    loss_mask: Any
    positions: Any
    segment_ids: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens.shape


def padding_share(batch: Batch) -> float:
    """The share of a batch's positions that hold no token, from 0 to 1.

    Example:
      >>> row = np.array([[1, 1, 2, 0]], np.int32)
      >>> padding_share(Batch(row, row, row, row, segment_ids=row))
      0.25
    """
    segments = np.asarray(batch.segment_ids)
    return float(np.count_nonzero(segments == 0) / max(segments.size, 1))
