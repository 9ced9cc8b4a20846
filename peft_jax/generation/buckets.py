"""Few shapes for many lengths: prompts are padded to buckets, so that little is compiled.

B batch, P prompt tokens but the last.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

_SHORTEST = 16


def length_bucket(length: int) -> int:
    """The length that `length` tokens are padded to: a power of two, or one and a half times one.

    Example:
      >>> [length_bucket(n) for n in (0, 16, 17, 33, 49, 100)]
      [16, 16, 24, 48, 64, 128]
    """
    power = 1 << (max(length, _SHORTEST) - 1).bit_length()
    between = power // 4 * 3
    return between if between > _SHORTEST and length <= between else power


def batch_bucket(rows: int, *, multiple: int = 1) -> int:
    """How many rows a batch of `rows` is padded to: a power of two, or the next `multiple` from it.

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
    """Prompts padded on the left, so that all end at the same place, and empty rows after them.

    Attributes:
      tokens: [B, P], the prompts without their last tokens, 0 where there is none.
      segment_ids: [B, P], 1 where there is a token.
      last: [B], the last tokens.
      empty: [B], the rows that are there as padding only.
    """

    tokens: Int32[np.ndarray, "batch prompt"]
    segment_ids: Int32[np.ndarray, "batch prompt"]
    last: Int32[np.ndarray, " batch"]
    empty: Bool[np.ndarray, " batch"]

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], *, multiple: int = 1) -> "PaddedPrompts":
        """The prompts, each of one token or more, in the smallest bucket of a `multiple` of rows.

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
