"""Measuring on held-out data: the loss, and for classifications which label the model prefers."""

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
from peft_jax.training.classification import ClassifierEvaluator
from peft_jax.training.losses import chunked_token_scores
from peft_jax.training.placement import RowPlacement
from peft_jax.training.prepare import Job

_LENGTH_MULTIPLE = 64
"""Rows of choices are cut to the longest, rounded up to this."""


@struct.dataclass
class ChoiceRows:
    """One row for each choice of each example; a pytree. Axes: B rows, T tokens, K of a choice.

    Attributes:
      tokens: int32 [B, T], the prompt and the choice without its last token.
      segment_ids: int32 [B, T], 1 where there is a token.
      before: int32 [B, K], the position that each token of the choice is predicted at.
      targets: int32 [B, K], the tokens of the choice.
      mask: float32 [B, K], 1 where there is one.
    """

    tokens: Any
    segment_ids: Any
    before: Any
    targets: Any
    mask: Any


class Evaluator:
    """Measures an adapted model on held-out data.

    Args:
      model: the model.
      spec: what is adapted.
      data: the held-out data; it may be empty.
      placement: where rows go.
      microbatches: into how many microbatches the data's batches are cut.
      microbatch_size: rows of one.
      chunk_size: positions whose logits are held at a time.
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

        # Every process reads the results, wherever the rows were.
        everywhere = jax.NamedSharding(placement.rows.mesh, jax.P())
        self._loss = jax.jit(loss, out_shardings=everywhere)
        self._preference = jax.jit(preference, out_shardings=everywhere)
        self._choices = [example for example in data.examples if example.choices]

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
          "loss", the mean over all held-out targets in nats; "token_accuracy", the share of them
          that the model holds likeliest; "targets", their number; and for classifications what the
          recipe measures of the preferred labels. None when stopped.
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
        """The log-likelihood of each choice of each example; None when stopped."""
        rows = choice_rows(self._choices, self._data.encoder)
        scores = []
        for part in choice_parts(rows, self._microbatch_size):
            if stop():
                return None
            scores.append(self._preference(frozen, adapter, self._placement.put(part)))
        return np.concatenate([np.asarray(score) for score in jax.device_get(scores)])


AnyEvaluator = Evaluator | ClassifierEvaluator


def make_evaluator(job: Job) -> AnyEvaluator:
    """What measures a run's model on its held-out data."""
    if isinstance(job.model, SequenceClassifier):
        return ClassifierEvaluator(
            job.model,
            job.spec,
            job.held_out,
            placement=job.placement,
            microbatches=job.config.train.gradient_accumulation,
        )
    assert isinstance(job.model, CausalLM)
    return Evaluator(
        job.model,
        job.spec,
        job.held_out,
        placement=job.placement,
        microbatches=job.config.train.gradient_accumulation,
        microbatch_size=job.config.train.microbatch_size,
        chunk_size=job.config.train.loss_chunk,
    )


def token_sums(
    model: CausalLM, params: Tree, batch: Batch, *, chunk_size: int
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Sums over a batch's targets: of their losses, of those that are the likeliest, of themselves.

    Args:
      model: the model.
      params: its parameters, with adapters bound.
      batch: rows [B, T].
      chunk_size: positions whose logits are held at a time.
    """
    hidden, _ = model.hidden_states(
        params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    scores, right = chunked_token_scores(
        hidden.reshape(-1, hidden.shape[-1]),
        model.head_kernel(params),
        batch.targets.reshape(-1),
        chunk_size=chunk_size,
    )
    mask = batch.loss_mask.reshape(-1)
    return -jnp.sum(scores * mask), jnp.sum(right.astype(jnp.float32) * mask), jnp.sum(mask)


def choice_log_likelihood(model: CausalLM, params: Tree, rows: ChoiceRows) -> Float[Array, " rows"]:
    """The log-likelihood of each row's choice after its prompt, in nats, summed over its tokens.

    Logits are computed where the choice is predicted, and nowhere else.
    """
    hidden, _ = model.hidden_states(params, rows.tokens, segment_ids=rows.segment_ids)
    picked = jnp.take_along_axis(hidden, rows.before[:, :, None], axis=1)
    log_probabilities = jax.nn.log_softmax(model.logits(params, picked), axis=-1)
    of_target = jnp.take_along_axis(log_probabilities, rows.targets[:, :, None], axis=-1)[..., 0]
    return jnp.sum(of_target * rows.mask, axis=-1)


def choice_rows(examples: Sequence[Example], encoder: Any) -> ChoiceRows:
    """Every choice of every example as a row, in order.

    Args:
      examples: with choices.
      encoder: the data's `Encoder`, so that choices meet prompts as answers do in training.
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
    """Yields rows a fixed number at a time; the last part is filled up with zeros."""
    for start in range(0, len(rows.tokens), size):
        yield jax.tree.map(lambda x, at=start: _filled(x[at : at + size], size), rows)


def preferred_answers(
    scores: Float[np.ndarray, " choices"], examples: Sequence[Example]
) -> list[str]:
    """Returns the likeliest choice of each example.

    Args:
      scores: Log-likelihood of each row of `choice_rows`; what follows is padding.
      examples: The examples that the rows were made of.
    """
    answers, at = [], 0
    for example in examples:
        best = int(np.argmax(scores[at : at + len(example.choices)]))
        answers.append(example.choices[best].strip())
        at += len(example.choices)
    return answers


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows filled up to `count` with zeros."""
    missing = count - len(rows)
    return np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)) if missing else rows
