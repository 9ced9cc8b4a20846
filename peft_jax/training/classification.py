"""The loss and the measures of an encoder with a head.

B rows, T tokens, C labels.
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
    """The head's outputs, and each row's loss as transformers takes it.

    The loss is the cross-entropy in nats or, with one output, the squared error.

    Args:
      model: the model.
      params: its parameters, with adapters bound.
      batch: rows [B, T].

    Returns:
      ([B, C], [B]), float32; rows that only fill the batch up have a loss of 0.
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
    """Measures an adapted classifier on held-out rows; is called as `Evaluator` is.

    Args:
      model: the model.
      spec: what is adapted.
      data: the held-out data; it may be empty.
      placement: where rows go.
      microbatches: into how many microbatches the data's batches are cut.
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
        """Whether there is nothing to measure on."""
        return len(self._data) == 0

    def __call__(
        self,
        frozen: Tree,
        adapter: AdapterState,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Measures.

        Args:
          frozen: the base's parameters, without those that are trained themselves.
          adapter: the adapter's arrays.
          stop: asked before each batch; when it says so, the rest is left.

        Returns:
          "loss", the mean over all held-out rows, "targets", their number, and what the recipe
          measures: accuracy, Matthews' correlation, F1, Pearson's and Spearman's correlation. None
          when stopped.
        """
        found: list[Any] = []
        for batch in self._data:
            if stop():
                return None
            placed = self._placement.put_microbatches(batch, self._microbatches)
            found.append(self._measure(frozen, adapter, placed))
        # A batch is cut into microbatches as it stands, [microbatches, B, ...], in every process.
        columns = zip(*jax.device_get(found), strict=True)
        outputs, losses = (
            np.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts])
            for parts in columns
        )
        # The last batch is filled up with rows after those of the examples.
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
