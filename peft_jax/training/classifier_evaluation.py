"""Computes the loss and metrics of a sequence classifier.

Axes: B rows, T tokens, C labels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.core import Tree
from peft_jax.data import EvalData, LabeledBatch
from peft_jax.models import SequenceClassifier
from peft_jax.training.placement import RowPlacement


def classifier_outputs(
    model: SequenceClassifier, params: Tree, batch: LabeledBatch
) -> tuple[Float[Array, "rows labels"], Float[Array, " rows"]]:
    """Returns the head's outputs and each row's loss, as transformers defines it.

    The loss is the cross-entropy in nats or, with one output, the squared error.

    Args:
      model: Sequence classifier.
      params: Parameters of the model, with adapters bound.
      batch: Rows [B, T].

    Returns:
      Outputs [B, C] and losses [B], float32. Padding rows have a loss of 0.
    """
    outputs = model(
        params, batch.tokens, token_types=batch.token_types, segment_ids=batch.segment_ids
    )
    if model.num_labels == 1:
        losses = jnp.square(outputs[:, 0] - batch.labels)
    else:
        labels = batch.labels.astype(jnp.int32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], axis=-1)
        losses = -chosen[:, 0]
    return outputs, losses * batch.loss_mask


class ClassifierEvaluator:
    """Evaluates an adapted classifier on held-out rows, with the interface of `Evaluator`.

    Args:
      model: Sequence classifier.
      spec: Specification of the adapter.
      data: Held-out data; may be empty.
      placement: Sharding of rows.
      microbatches: Number of microbatches of a batch.
    """

    def __init__(
        self,
        model: SequenceClassifier,
        spec: AdapterSpec,
        data: EvalData,
        *,
        placement: RowPlacement,
        microbatches: int = 1,
    ):
        self._data = data
        self._placement = placement
        self._microbatches = microbatches
        self._regression = model.num_labels == 1

        def measure(frozen: Tree, adapter: AdapterState, batch: LabeledBatch):
            bound = spec.bind(frozen, adapter)
            return jax.lax.map(lambda rows: classifier_outputs(model, bound, rows), batch)

        everywhere = jax.NamedSharding(placement.rows.mesh, jax.P())
        self._measure = jax.jit(measure, out_shardings=everywhere)

    @property
    def empty(self) -> bool:
        """Whether there are no held-out rows."""
        return len(self._data) == 0

    def __call__(
        self,
        frozen: Tree,
        adapter: AdapterState,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Evaluates all held-out rows.

        Args:
          frozen: Frozen parameters of the base model.
          adapter: Arrays of the adapter.
          stop: Called before each batch; true stops the evaluation.

        Returns:
          "loss", the mean over held-out rows, "targets", their number, and the recipe's metrics:
          accuracy, Matthews correlation, F1, Pearson and Spearman correlation. None if stopped.
        """
        found: list[Any] = []
        for batch in self._data:
            if stop():
                return None
            placed = self._placement.put_microbatches(batch, self._microbatches)
            found.append(self._measure(frozen, adapter, placed))
        # Microbatches are consecutive rows in every process, [microbatches, B, ...].
        columns = zip(*jax.device_get(found), strict=True)
        outputs, losses = (
            np.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts])
            for parts in columns
        )
        # The last batch ends with padding rows.
        examples = self._data.examples
        measured = {
            "loss": float(np.sum(losses, dtype=np.float64) / len(examples)),
            "targets": len(examples),
        }
        answers = self._answers(outputs[: len(examples)])
        return measured | self._data.recipe.metrics(answers, examples)

    def _answers(self, outputs: np.ndarray) -> Sequence[str]:
        values = outputs[:, 0] if self._regression else np.argmax(outputs, axis=-1)
        return [self._data.recipe.answer_of(float(value)) for value in values.tolist()]
