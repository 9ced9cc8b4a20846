"""Pads prompts to buckets of lengths and batch sizes, to compile few programs.

Axes: B batch, P prompt tokens without the last.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

_SHORTEST = 16


def length_bucket(length: int) -> int:
    """Returns the padded length of `length` tokens: 2^n or 1.5 · 2^n.

    Example:
      >>> [length_bucket(n) for n in (0, 16, 17, 33, 49, 100)]
      [16, 16, 24, 48, 64, 128]
    """
    power = 1 << (max(length, _SHORTEST) - 1).bit_length()
    between = power // 4 * 3
    return between if between > _SHORTEST and length <= between else power


def batch_bucket(rows: int, *, multiple: int = 1) -> int:
    """Returns the padded size of a batch: a power of two, rounded up to a multiple.

    Example:
      >>> [batch_bucket(n) for n in (1, 2, 3, 5)]
      [1, 2, 4, 8]
      >>> batch_bucket(3, multiple=6)
      6
    """
    power = 1 << (rows - 1).bit_length()
    return -(-power // multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedPrompts:
    """Left-padded prompts, followed by empty rows.

    Attributes:
      tokens: Prompts without their last tokens, int32 [B, P]; 0 at padding.
      segment_ids: 1 at tokens and 0 at padding, int32 [B, P].
      last: Last tokens, int32 [B].
      empty: Whether a row is only padding, bool [B].
    """

    tokens: Int32[np.ndarray, "batch prompt"]
    segment_ids: Int32[np.ndarray, "batch prompt"]
    last: Int32[np.ndarray, " batch"]
    empty: Bool[np.ndarray, " batch"]

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], *, multiple: int = 1) -> "PaddedPrompts":
        """Pads non-empty prompts to the smallest bucket whose rows are a multiple of `multiple`.

        Example:
          >>> padded = PaddedPrompts.of([np.array([6, 7, 8]), np.array([9])])
          >>> padded.tokens[:, -3:].tolist(), padded.segment_ids[:, -3:].tolist()
          ([[0, 6, 7], [0, 0, 0]], [[0, 1, 1], [0, 0, 0]])
          >>> padded.last
          array([8, 9], dtype=int32)
        """
        batch = batch_bucket(len(prompts), multiple=multiple)
        length = length_bucket(max(map(len, prompts)) - 1)
        tokens, segment_ids = np.zeros((2, batch, length), np.int32)
        last = np.zeros(batch, np.int32)
        for row, prompt in enumerate(prompts):
            start = length - len(prompt) + 1
            tokens[row, start:] = prompt[:-1]
            segment_ids[row, start:] = 1
            last[row] = prompt[-1]
        empty = np.arange(batch) >= len(prompts)
        return cls(tokens=tokens, segment_ids=segment_ids, last=last, empty=empty)
