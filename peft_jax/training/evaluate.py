"""Evaluates a language model on held-out data: loss, token accuracy and preferred labels."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.core import Tree
from peft_jax.data import Batch, EvalData, Example
from peft_jax.models import CausalLM, SequenceClassifier
from peft_jax.training.classifier_evaluation import ClassifierEvaluator
from peft_jax.training.losses import chunked_token_scores
from peft_jax.training.placement import RowPlacement
from peft_jax.training.prepare import Job

_LENGTH_MULTIPLE = 64
"""Rows of choices are padded to a multiple of this number of tokens."""


@struct.dataclass
class ChoiceRows:
    """One row per choice of each example; a pytree. Axes: B rows, T tokens, K tokens of a choice.

    Attributes:
      tokens: Prompt and choice without the last token, int32 [B, T].
      segment_ids: 1 at tokens and 0 at padding, int32 [B, T].
      before: Position at which each token of the choice is predicted, int32 [B, K].
      targets: Tokens of the choice, int32 [B, K].
      mask: 1 at tokens and 0 at padding of a choice, float32 [B, K].
    """

    tokens: Any
    segment_ids: Any
    before: Any
    targets: Any
    mask: Any


class Evaluator:
    """Evaluates an adapted language model on held-out data.

    Args:
      model: Language model.
      spec: Specification of the adapter.
      data: Held-out data; may be empty.
      placement: Sharding of rows.
      microbatches: Number of microbatches of a batch.
      microbatch_size: Number of rows of a microbatch.
      chunk_size: Number of positions whose logits are held at once.
    """

    def __init__(
        self,
        model: CausalLM,
        spec: AdapterSpec,
        data: EvalData,
        *,
        placement: RowPlacement,
        microbatches: int,
        microbatch_size: int,
        chunk_size: int,
    ):
        self._data = data
        self._placement = placement
        self._microbatches = microbatches
        self._microbatch_size = microbatch_size

        def loss(frozen: Tree, adapter: AdapterState, batch: Batch):
            bound = spec.bind(frozen, adapter)
            one = functools.partial(token_sums, model, bound, chunk_size=chunk_size)
            return jax.tree.map(jnp.sum, jax.lax.map(one, batch))

        def preference(frozen: Tree, adapter: AdapterState, rows: ChoiceRows):
            return choice_log_likelihood(model, spec.bind(frozen, adapter), rows)

        # Results are replicated, because every process reads them.
        everywhere = jax.NamedSharding(placement.rows.mesh, jax.P())
        self._loss = jax.jit(loss, out_shardings=everywhere)
        self._preference = jax.jit(preference, out_shardings=everywhere)
        self._choices = [example for example in data.examples if example.choices]

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
        """Evaluates all held-out data.

        Args:
          frozen: Frozen parameters of the base model.
          adapter: Arrays of the adapter.
          stop: Called before each batch; true stops the evaluation.

        Returns:
          "loss", the mean over held-out targets in nats; "token_accuracy", the share of targets
          that are the likeliest token; "targets", their number; and for examples with choices the
          recipe's metrics of the preferred ones. None if stopped.
        """
        sums = []
        for batch in self._data:
            if stop():
                return None
            placed = self._placement.put_microbatches(batch, self._microbatches)
            sums.append(self._loss(frozen, adapter, placed))
        total, right, targets = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
        measured = {
            "loss": float(total / max(targets, 1.0)),
            "token_accuracy": float(right / max(targets, 1.0)),
            "targets": int(targets),
        }
        if self._choices:
            scores = self._scores(frozen, adapter, stop)
            if scores is None:
                return None
            answers = preferred_answers(scores, self._choices)
            measured |= self._data.recipe.metrics(answers, self._choices)
        return measured

    def _scores(
        self, frozen: Tree, adapter: AdapterState, stop: Callable[[], bool]
    ) -> np.ndarray | None:
        """Returns the log-likelihood of each choice of each example; None if stopped."""
        rows = choice_rows(self._choices, self._data.encoder)
        scores = []
        for part in choice_parts(rows, self._microbatch_size):
            if stop():
                return None
            scores.append(self._preference(frozen, adapter, self._placement.put(part)))
        return np.concatenate([np.asarray(score) for score in jax.device_get(scores)])


AnyEvaluator = Evaluator | ClassifierEvaluator


def make_evaluator(job: Job, *, spec: AdapterSpec | None = None) -> AnyEvaluator:
    """Returns the evaluator of a run's model.

    Args:
      job: Job of the run.
      spec: Specification of another adapter to evaluate; None for the run's.
    """
    spec = job.spec if spec is None else spec
    if isinstance(job.model, SequenceClassifier):
        return ClassifierEvaluator(
            job.model,
            spec,
            job.held_out,
            placement=job.placement,
            microbatches=job.config.train.gradient_accumulation,
        )
    assert isinstance(job.model, CausalLM)
    return Evaluator(
        job.model,
        spec,
        job.held_out,
        placement=job.placement,
        microbatches=job.config.train.gradient_accumulation,
        microbatch_size=job.config.train.microbatch_size,
        chunk_size=job.config.train.loss_chunk,
    )


def token_sums(
    model: CausalLM, params: Tree, batch: Batch, *, chunk_size: int
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Returns a batch's sum of losses, its correctly predicted targets, and its targets.

    Args:
      model: Language model.
      params: Parameters of the model, with adapters bound.
      batch: Rows [B, T].
      chunk_size: Number of positions whose logits are held at once.

    Returns:
      Sum of losses in nats, number of targets that are the likeliest token, and number of targets;
      float32 [] each.
    """
    hidden, _ = model.hidden_states(
        params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    scores, right = chunked_token_scores(
        hidden.reshape(-1, hidden.shape[-1]),
        model.head_kernel(params),
        batch.targets.reshape(-1),
        chunk_size=chunk_size,
        logit_rule=model.logit_rule,
    )
    mask = batch.loss_mask.reshape(-1)
    return -jnp.sum(scores * mask), jnp.sum(right.astype(jnp.float32) * mask), jnp.sum(mask)


def choice_log_likelihood(model: CausalLM, params: Tree, rows: ChoiceRows) -> Float[Array, " rows"]:
    """Returns the log-likelihood of each row's choice given its prompt, in nats.

    Logits are only computed at the positions that predict the choice.
    """
    hidden, _ = model.hidden_states(params, rows.tokens, segment_ids=rows.segment_ids)
    picked = jnp.take_along_axis(hidden, rows.before[:, :, None], axis=1)
    log_probabilities = jax.nn.log_softmax(model.logits(params, picked), axis=-1)
    of_target = jnp.take_along_axis(log_probabilities, rows.targets[:, :, None], axis=-1)[..., 0]
    return jnp.sum(of_target * rows.mask, axis=-1)


def choice_rows(examples: Sequence[Example], encoder: Any) -> ChoiceRows:
    """Returns one row per choice of every example, in order.

    Args:
      examples: Examples with choices.
      encoder: Encoder of the data, which joins choices to prompts as answers in training.
    """
    pairs = [
        (encoder.prompt_ids(example), choice)
        for example in examples
        for choice in encoder.choice_ids(example)
    ]
    longest = max(len(prompt) + len(choice) - 1 for prompt, choice in pairs)
    length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    width = max(len(choice) for _, choice in pairs)
    tokens = np.full((len(pairs), length), encoder.pad_id, np.int32)
    segment_ids = np.zeros((len(pairs), length), np.int32)
    before = np.zeros((len(pairs), width), np.int32)
    targets = np.zeros((len(pairs), width), np.int32)
    mask = np.zeros((len(pairs), width), np.float32)
    for row, (prompt, choice) in enumerate(pairs):
        ids = np.concatenate([prompt, choice])[:-1]
        tokens[row, : len(ids)] = ids
        segment_ids[row, : len(ids)] = 1
        before[row, : len(choice)] = len(prompt) - 1 + np.arange(len(choice))
        targets[row, : len(choice)] = choice
        mask[row, : len(choice)] = 1.0
    return ChoiceRows(
        tokens=tokens, segment_ids=segment_ids, before=before, targets=targets, mask=mask
    )


def choice_parts(rows: ChoiceRows, size: int) -> Iterator[ChoiceRows]:
    """Yields `size` rows at a time; the last part is padded with zeros."""
    for start in range(0, len(rows.tokens), size):
        yield jax.tree.map(lambda x, at=start: _filled(x[at : at + size], size), rows)


def preferred_answers(
    scores: Float[np.ndarray, " choices"], examples: Sequence[Example]
) -> list[str]:
    """Returns the likeliest choice of each example.

    Args:
      scores: Log-likelihood of each row of `choice_rows`, and of padding rows after them.
      examples: Examples of the rows.
    """
    answers, at = [], 0
    for example in examples:
        best = int(np.argmax(scores[at : at + len(example.choices)]))
        answers.append(example.choices[best].strip())
        at += len(example.choices)
    return answers


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Pads rows to `count` with zeros."""
    missing = count - len(rows)
    return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows
