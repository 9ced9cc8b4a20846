"""Scores tokens given their prefixes, in batches of few shapes.

Axes: B rows, T tokens, K targets of a row, D embed.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from peft_jax.core import Tree
from peft_jax.generation.padded_prompts import length_bucket
from peft_jax.models import CausalLM
from peft_jax.training.losses import chunked_token_scores

_CHUNK_SIZE = 512
"""Number of positions whose logits are held at once: 256 MiB for a vocabulary of 128,256."""

_FEW, _MANY = 8, 64
"""Numbers of targets that rows are padded to; rows with more are padded to their tokens."""


@dataclasses.dataclass(frozen=True)
class ScoringRow:
    """Sequence with the tokens to score.

    Attributes:
      tokens: int32 [t], tokens that the model reads.
      before: int32 [k], positions in `tokens` at which the targets are predicted.
      targets: int32 [k], tokens to score.
    """

    tokens: Int32[np.ndarray, " t"]
    before: Int32[np.ndarray, " k"]
    targets: Int32[np.ndarray, " k"]


@dataclasses.dataclass(frozen=True)
class ScoredRow:
    """Scores of a row's targets.

    Attributes:
      scores: float32 [k], log-probabilities in nats.
      likeliest: bool [k], whether no token is more likely than the target.
    """

    scores: Float32[np.ndarray, " k"]
    likeliest: Bool[np.ndarray, " k"]


class TokenScorer:
    """Scores tokens, compiling one program per bucket of shapes.

    Args:
      model: Model to evaluate.
      params: Parameters, with adapters bound or merged.
      row_sharding: Sharding of the rows of a batch.
      batch_size: Rows per batch; rounded up so that they divide among the devices.
    """

    def __init__(
        self,
        model: CausalLM,
        params: Tree,
        *,
        row_sharding: jax.sharding.NamedSharding,
        batch_size: int,
    ):
        self._model = model
        self._params = params
        self._sharding = row_sharding
        parts = row_sharding.mesh.size
        parts //= row_sharding.shard_shape((parts,))[0]
        self._batch_size = -(-batch_size // parts) * parts

    def __call__(self, rows: Sequence[ScoringRow]) -> Iterator[dict[int, ScoredRow]]:
        """Scores rows, the longest first.

        Args:
          rows: Rows in any order.

        Yields:
          Scored rows by index in `rows`, after each batch.

        Raises:
          FloatingPointError: A log-probability is not finite.
        """
        buckets: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        for index, row in enumerate(rows):
            length = length_bucket(len(row.tokens))
            buckets[length, _target_bucket(len(row.targets), length)].append(index)
        for (length, width), indices in sorted(buckets.items(), reverse=True):
            for start in range(0, len(indices), self._batch_size):
                batch = {index: rows[index] for index in indices[start : start + self._batch_size]}
                yield self._score(batch, length, width)

    def _score(self, rows: dict[int, ScoringRow], length: int, width: int) -> dict[int, ScoredRow]:
        """Scores one batch, padded to [B, `length`] tokens and [B, `width`] targets."""
        tokens, segment_ids = np.zeros((2, self._batch_size, length), np.int32)
        before, targets = np.zeros((2, self._batch_size, width), np.int32)
        for place, row in enumerate(rows.values()):
            tokens[place, : len(row.tokens)] = row.tokens
            segment_ids[place, : len(row.tokens)] = 1
            before[place, : len(row.before)] = row.before
            targets[place, : len(row.targets)] = row.targets
        placed = (jax.device_put(x, self._sharding) for x in (tokens, segment_ids, before, targets))
        scores, likeliest = jax.device_get(_token_scores(self._params, *placed, model=self._model))
        scored = {}
        for place, (index, row) in enumerate(rows.items()):
            count = len(row.targets)
            if not np.isfinite(scores[place, :count]).all():
                raise FloatingPointError(
                    "the model's log-probabilities are not finite; its parameters or its adapter's"
                    " contain NaN or infinity, or its dtype is too narrow"
                )
            scored[index] = ScoredRow(scores[place, :count], likeliest[place, :count])
        return scored


@functools.partial(jax.jit, static_argnames=("model",))
def _token_scores(
    params: Tree,
    tokens: Int32[Array, "rows tokens"],
    segment_ids: Int32[Array, "rows tokens"],
    before: Int32[Array, "rows targets"],
    targets: Int32[Array, "rows targets"],
    *,
    model: CausalLM,
) -> tuple[Any, Any]:
    """Returns log-probabilities, and whether each is the largest; computes no other logits."""
    hidden, _ = model.hidden_states(params, tokens, segment_ids=segment_ids)
    picked = jnp.take_along_axis(hidden, before[:, :, None], axis=1)
    scores, likeliest = chunked_token_scores(
        picked.reshape(-1, picked.shape[-1]),
        model.head_kernel(params),
        targets.reshape(-1),
        chunk_size=_CHUNK_SIZE,
    )
    return scores.reshape(targets.shape), likeliest.reshape(targets.shape)


def _target_bucket(count: int, length: int) -> int:
    """Returns the number of targets that a row with `count` of them is padded to.

    Example:
      >>> [_target_bucket(n, 256) for n in (1, 8, 9, 65)]
      [8, 8, 64, 256]
      >>> _target_bucket(20, 24)
      24
    """
    enough = next((size for size in (_FEW, _MANY) if count <= size), None)
    return max(length, count) if enough is None or enough > length else enough
