"""Measures rows: losses, and how confident and how right the model's answers are.

Axes: B rows, T tokens, D features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from peft_jax.core import Tree, linear
from peft_jax.data import AnyBatch, LabeledBatch
from peft_jax.training.classifier_evaluation import classifier_outputs

BINS = 15
"""Number of equally wide bins of confidence."""


@struct.dataclass
class RowMeasures:
    """Measurements of a batch.

    Attributes:
      losses: Summed loss of each row, float32 [B].
      targets: Number of targets of each row, 0 for padding, float32 [B].
      answers: A classifier's answer to each row, float32 [B]; None for a language model.
      bins: Number of answers, their summed confidence and the number of right ones in each bin of
        confidence, float32 [3, BINS]. An answer is the likeliest token at a target, or the
        likeliest label. Zero for a regression.
    """

    losses: Array | np.ndarray
    targets: Array | np.ndarray
    answers: Array | np.ndarray | None
    bins: Array | np.ndarray


def measure_rows(model: Any, bound: Tree, batch: AnyBatch, *, chunk_size: int) -> RowMeasures:
    """Measures a batch.

    Args:
      model: Language model or classifier.
      bound: Parameters, with adapters bound.
      batch: Rows [B, T].
      chunk_size: Number of positions whose logits are held at once.
    """
    if isinstance(batch, LabeledBatch):
        outputs, losses = classifier_outputs(model, bound, batch)
        if model.num_labels == 1:
            values, bins = outputs[:, 0], jnp.zeros((3, BINS), jnp.float32)
        else:
            values = jnp.argmax(outputs, axis=-1)
            right = values == batch.labels.astype(values.dtype)
            confidence = jnp.max(jax.nn.softmax(outputs), axis=-1)
            bins = _binned(confidence, right, batch.loss_mask)
        return RowMeasures(losses, batch.loss_mask, values.astype(jnp.float32), bins)
    hidden, _ = model.hidden_states(
        bound, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    head = model.head_kernel(bound)
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets, mask = batch.targets.reshape(-1), batch.loss_mask.reshape(-1)
    count = max(1, -(-flat.shape[0] // chunk_size))

    def score(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        h, target, there = chunk
        logs = jax.nn.log_softmax(linear(h, head).astype(jnp.float32), axis=-1)
        chosen = jnp.take_along_axis(logs, target[:, None], axis=-1)[:, 0]
        likeliest = jnp.argmax(logs, axis=-1).astype(target.dtype)
        return chosen, _binned(jnp.exp(jnp.max(logs, axis=-1)), likeliest == target, there)

    scores, bins = jax.lax.map(
        score, (_chunks(flat, count), _chunks(targets, count), _chunks(mask, count))
    )
    losses = -scores.reshape(-1)[: flat.shape[0]].reshape(batch.tokens.shape) * batch.loss_mask
    return RowMeasures(losses.sum(axis=-1), batch.loss_mask.sum(axis=-1), None, bins.sum(axis=0))


def calibration(bins: Float[Array | np.ndarray, "3 bins"]) -> dict[str, float]:
    """Returns the expected calibration error (ECE), the mean confidence and the accuracy.

    The ECE is the mean over all answers of the distance between confidence and accuracy in the
    answer's bin (Guo et al., 2017, arXiv 1706.04599).

    Example:
      >>> found = calibration(np.array([[3.0, 1.0], [1.2, 0.9], [2.0, 0.0]]))
      >>> {name: round(value, 4) for name, value in found.items()}
      {'ece': 0.425, 'confidence': 0.525, 'accuracy': 0.5}
    """
    number, confidence, right = np.asarray(bins, np.float64)
    total = number.sum()
    if not total:
        return {}
    return {
        "ece": float(np.abs(confidence - right).sum() / total),
        "confidence": float(confidence.sum() / total),
        "accuracy": float(right.sum() / total),
    }


def _binned(confidence: Array, right: Array, mask: Array) -> Float[Array, "3 bins"]:
    """Returns the sums of the mask, of confidence and of right answers in each bin."""
    index = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)
    values = jnp.stack([jnp.ones_like(confidence), confidence, right.astype(confidence.dtype)])
    values = values * mask
    return jnp.zeros((3, BINS), jnp.float32).at[:, index].add(values)


def _chunks(x: Array, count: int) -> Array:
    """Returns [N, ...] as chunks [K, C, ...], padded with zeros."""
    missing = -x.shape[0] % count
    if missing:
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, -1, *x.shape[1:])
