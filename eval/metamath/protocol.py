"""Defines PEFT's protocol: the rows of each step, the loss over them, and the learning rates.

The protocol is huggingface/peft, method_comparison/MetaMathQA at the commit `COMMIT`. Its files are
named beside what they define. The prompt and the comparison of answers are those of the recipe
`metamath`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from peft_jax.core import Tree
from peft_jax.data import Batch
from peft_jax.training.step import LossFn, summed_loss

COMMIT = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"
"""Commit of huggingface/peft that the protocol was read from."""

MOST_CHARACTERS = 1300
"""Largest length of query, space and response of a training row (data.py, CHAR_LIMIT)."""

VALIDATION_ROWS = 50
"""Number of GSM8K's training rows to validate on (data.py, VALID_SIZE)."""

BUCKET = 20
"""Number of batches whose rows are sorted by length together (run.py, BUCKET_FACTOR)."""

WARMUP_RATIO = 0.1
"""Share of the steps over which the rate rises (utils.py, WARMUP_STEP_RATIO)."""

MOST_NEW_TOKENS, MOST_TOKENS = 300, 800
"""Limits of a generated answer, and of it with its prompt (default_training_params.json)."""

ANSWERED_TOGETHER = 50
"""Number of questions in a batch (default_training_params.json, batch_size_eval)."""

_WIDTH = 64
"""Batches are padded to a multiple of this, so that few programs are compiled."""


def is_short(query: str, response: str) -> bool:
    """Returns whether a training row is kept (data.py, get_filtered_dataset)."""
    return len(f"{query} {response}") <= MOST_CHARACTERS


def validation_indices(rows: int) -> np.ndarray:
    """Returns the training rows of GSM8K to validate on (data.py, get_train_valid_test_datasets).

    Args:
      rows: Number of training rows of GSM8K.
    """
    indices = np.arange(rows)
    np.random.RandomState(0).shuffle(indices)
    return indices[:VALIDATION_ROWS]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Yields the rows of each batch: in order, but by falling length within each bucket.

    Args:
      lengths: Number of tokens of each row, in the order of the data.
      batch_size: Number of rows of a batch.

    Source: utils.py, BucketIterator.

    Example:
      >>> [rows.tolist() for rows in batches_by_length([3, 5, 4, 9], 2)]
      [[3, 1], [2, 0]]
    """
    size = batch_size * BUCKET
    for start in range(0, len(lengths), size):
        bucket = np.asarray(lengths[start : start + size])
        order = start + np.argsort(-bucket, kind="stable")
        for at in range(0, len(order), batch_size):
            yield order[at : at + batch_size]


def make_batch(rows: Sequence[Sequence[int]], end: int) -> dict[str, Any]:
    """Returns a batch whose every token is predicted, for `mean_loss`.

    An end token follows each row, except the longest of the batch, which the protocol pads to its
    own length (run.py, train: the labels of the first padding token are kept).

    Args:
      rows: Tokens of each row.
      end: End token.

    Returns:
      "rows", a `Batch`, and "tokens", the numbers of tokens without end tokens, float32 [B].
    """
    lengths = np.array([len(row) for row in rows])
    ends = lengths + (lengths < lengths.max())
    width = _WIDTH * math.ceil(lengths.max() / _WIDTH) + 1
    tokens = np.full((len(rows), width), end, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return {
        "rows": Batch.from_tokens(tokens, lengths=ends),
        "tokens": lengths.astype(np.float32),
    }


def loss_function(chunk_size: int) -> LossFn:
    """Returns the summed losses of a batch, and the number of its tokens that divides them.

    The protocol divides by the tokens that are attended to (run.py, num_items_in_batch), a few
    more than are predicted.

    Args:
      chunk_size: Number of positions whose logits are held at once.
    """

    def loss(model: Any, params: Tree, batch: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
        total, _ = summed_loss(model, params, batch["rows"], chunk_size=chunk_size, packed=False)
        return total, jnp.sum(batch["tokens"])

    return loss


def cosine_with_warmup(steps: int) -> optax.Schedule:
    """Returns the factor on the learning rate by step, from 0; that of the first step is 0.

    Args:
      steps: Number of steps of the run.

    Source: utils.py, get_optimizer_and_scheduler; transformers,
    get_cosine_schedule_with_warmup.

    Example:
      >>> [round(float(cosine_with_warmup(20)(step)), 3) for step in (0, 1, 2, 11)]
      [0.0, 0.5, 1.0, 0.5]
    """
    warmup = int(WARMUP_RATIO * steps)

    def factor(step: Any) -> Float[Array, ""]:
        at = jnp.asarray(step, jnp.float32)
        rise = at / max(1, warmup)
        fall = 0.5 * (1.0 + jnp.cos(math.pi * (at - warmup) / max(1, steps - warmup)))
        return jnp.where(at < warmup, rise, jnp.maximum(fall, 0.0))

    return factor
