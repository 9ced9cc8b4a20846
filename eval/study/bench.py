"""A task's model, data and compiled programs, which all of its cells share."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.adapters.method import GradientFactors
from peft_jax.core import Path as TreePath
from peft_jax.core import Tree
from peft_jax.data import AnyBatch, DataSettings, EvalData, LabeledBatch, build_data
from peft_jax.data.examples import Example
from peft_jax.generation import GenerationSettings, generate
from peft_jax.hub import load_params
from peft_jax.models import CausalLM, SequenceClassifier
from peft_jax.optim import component_values, make_optimizer
from peft_jax.parallel import on_mesh
from peft_jax.training import RunConfig, TrainState
from peft_jax.training.blueprint import Blueprint, draw_blueprint
from peft_jax.training.classification import classifier_outputs
from peft_jax.training.evaluate import (
    choice_log_likelihood,
    choice_parts,
    choice_rows,
    preferred_answers,
)
from peft_jax.training.losses import chunked_token_scores
from peft_jax.training.prepare import prepare, train_head
from peft_jax.training.program import step_bytes

from .settings import ArmSettings, TaskSettings

_OWN_TOKENS = 128
"""Tokens of a text of the base's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model does on a fixed set of rows, row by row in the data's order.

    Attributes:
      losses: float64 [n], each row's summed loss.
      targets: float64 [n], over how many targets it is summed.
      measures: the recipe's own measures of all rows together, of an encoder's answers or of a
        language model's likeliest choices; empty where the task names none.
    """

    losses: np.ndarray
    targets: np.ndarray
    measures: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean over all targets."""
        return float(self.losses.sum() / self.targets.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """An arm's training step, compiled once for all rates and seeds.

    Attributes:
      blueprint: The program of a run, with a learning rate that is data; see `with_rate`.
      step: The compiled step.
      make_state: Makes the state before the first step; takes the buffers of what is trained.
      step_bytes: Bytes that a step needs on each device, as the compiler counts them.
    """

    blueprint: Blueprint
    step: jax.stages.Compiled
    make_state: Callable[[Tree], TrainState]
    step_bytes: int


def with_rate(
    inner: optax.GradientTransformationExtraArgs, rate: float, settled: Collection[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """`inner` with its updates times a rate that is kept in the state, [].

    A learning rate that is a constant of the program would be compiled anew for each; this one is
    data. `inner` is built for a learning rate of 1, which is the last factor of its updates. What
    stands under the components `settled` has rates of its own in `inner`, and keeps them.
    """

    def init(params: Any) -> Any:
        return {"rate": jnp.asarray(rate, jnp.float32), "inner": inner.init(params)}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        steps, after = inner.update(updates, state["inner"], params, **extra)
        rates = component_values(steps, dict.fromkeys(settled, 1.0), state["rate"])
        scaled = jax.tree.map(lambda step, rate: step * rate, steps, rates)
        return scaled, {"rate": state["rate"], "inner": after}

    return optax.GradientTransformationExtraArgs(init, update)


class Bench:
    """A task made ready: loaded once, used by every cell.

    Args:
      task: the task.
      arm: any of the arms; what is loaded does not depend on it.

    Attributes:
      task: the task.
      model: its model, of the size of head that the task wants.
      tokenizer: the model's.
      held_out: the rows rates are chosen on, "tuning", and those of the final measurement, "test".
    """

    def __init__(self, task: TaskSettings, arm: ArmSettings):
        self.task = task
        config = task.run_config(arm, learning_rate=1.0, seed=0)
        job = prepare(config, say=lambda message: None)
        job.train.close()
        self.model, self.tokenizer, self._folder = job.model, job.tokenizer, job.folder
        self._config, self._steps = config, job.steps
        self._mesh, self._layout = job.mesh, job.params
        self._new_head = job.new_head
        self.held_out = {"tuning": job.held_out, "test": self._test_data(config)}
        self._rows = {
            name: [jax.tree.map(jnp.asarray, batch) for batch in data]
            for name, data in self.held_out.items()
        }
        self._batches: dict[int, list[AnyBatch]] = {}
        self._programs: dict[str, Program] = {}
        self._evaluations: dict[str, Any] = {}
        self._preferences: dict[str, Any] = {}
        self._factors: dict[tuple[int, int, int], dict[TreePath, GradientFactors]] = {}
        self._own: Any = None
        self._check_metric()

    def _check_metric(self) -> None:
        """Raises ValueError unless the task's measure is one that its test rows have."""
        metric, data = self.task.metric, self.held_out["test"]
        examples = self._scored(data)
        known = data.recipe.metrics([example.answer for example in examples], examples)
        if metric and metric not in known:
            names = ", ".join(known) or "none, since its answers are not of a few choices"
            raise ValueError(
                f"task {self.task.name!r}: metric is {metric!r}, but the measures of recipe"
                f" {data.recipe.name!r} are {names}"
            )

    # Data.

    def _scored(self, data: EvalData) -> Sequence[Example]:
        """The examples whose answers are measured: of a language model those with choices."""
        if isinstance(self.model, SequenceClassifier):
            return data.examples
        return [example for example in data.examples if example.choices]

    def batches(self, seed: int) -> list[AnyBatch]:
        """The batches of all steps, the same for every arm."""
        if seed not in self._batches:
            train, _ = self._build(dataclasses.replace(self._config.data, eval_rows=1), seed)
            self._batches[seed] = list(itertools.islice(train, self._steps))
            train.close()
        return self._batches[seed]

    def _build(self, settings: DataSettings, seed: int) -> tuple[Any, EvalData]:
        return build_data(
            settings,
            self.tokenizer,
            batch_size=self._config.train.batch_size,
            max_length=self._config.train.max_length,
            seed=seed,
            labeled=isinstance(self.model, SequenceClassifier),
        )

    def _test_data(self, config: RunConfig) -> EvalData:
        # Not packed: a row is one example, and examples are what the test of significance is over.
        changes = {"hold_out": None, "packing": False, **self.task.test}
        train, test = self._build(dataclasses.replace(config.data, **changes), 0)
        train.close()
        return test

    # Parameters.

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def params(self, seed: int) -> Tree:
        """Loads the base's parameters; a new head depends on the seed alone."""
        key = jax.random.fold_in(jax.random.key(seed), 2) if self._new_head else None
        return load_params(
            self._folder,
            self.model,
            dtype=self._config.model.dtype,
            quantization=self._config.model.quantization,
            sharding=jax.tree.map(lambda leaf: leaf.sharding, self._layout),
            head_key=key,
        )

    def spec(self, config: RunConfig) -> AdapterSpec:
        """Returns what is adapted, a new head included."""
        return train_head(config.spec, self.model)

    def initialize(self, arm: ArmSettings, config: RunConfig) -> AdapterState:
        """Makes the adapter's first arrays, as a run of `config` does."""
        blueprint = self.program(arm, config).blueprint
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        with on_mesh(blueprint.mesh):
            factors = self._gradient_factors(blueprint, config, key)
            return blueprint.initialize(key, self.params(config.seed), factors=factors)

    def _gradient_factors(
        self, blueprint: Blueprint, config: RunConfig, key: jax.Array
    ) -> dict[TreePath, GradientFactors]:
        """Estimates the gradient on the first batches; arms with the same ranks share it."""
        rank = config.spec.method.gradient_rank
        if not rank:
            return {}
        place = (config.seed, rank, config.init_batches)
        if place not in self._factors:
            batches = self.batches(config.seed)[: blueprint.init_batches]
            self._factors[place] = blueprint.gradient_factors(
                key, self.params(config.seed), blueprint.init_microbatches(batches)
            )
        return self._factors[place]

    # Programs.

    def program(self, arm: ArmSettings, config: RunConfig) -> Program:
        """Returns the arm's step, compiled once for all rates and seeds.

        Its dropout is that of seed 0 in every cell, because the seed is part of the program.
        """
        if arm.name not in self._programs:
            self._programs[arm.name] = self._compile(dataclasses.replace(config, seed=0))
        return self._programs[arm.name]

    def _compile(self, config: RunConfig) -> Program:
        settings = dataclasses.replace(config.applied_optimizer, learning_rate=1.0)
        mixing = config.mixing if config.spec.method.branches else None
        inner = make_optimizer(settings, self._steps, mixing=mixing)
        blueprint = draw_blueprint(
            config,
            self.model,
            self._mesh,
            spec=self.spec(config),
            optimizer=with_rate(inner, 1.0, settings.learning_rates),
        )
        compiled = blueprint.trace_step().lower().compile()
        return Program(
            blueprint=blueprint,
            step=compiled,
            make_state=blueprint.jit_make_state(),
            step_bytes=step_bytes(compiled) or 0,
        )

    # Measuring.

    def measure(
        self, arm: ArmSettings, config: RunConfig, adapter: AdapterState, which: str
    ) -> Measured:
        """The losses of held-out rows: of "tuning" or of "test"."""
        spec = self.spec(config)
        frozen = spec.frozen(self.params(config.seed))
        if arm.name not in self._evaluations:
            self._evaluations[arm.name] = jax.jit(
                functools.partial(row_losses, self.model, spec, config.train.loss_chunk)
            )
        evaluate = self._evaluations[arm.name]
        found = [evaluate(frozen, adapter, rows) for rows in self._rows[which]]
        losses, targets, *outputs = (
            np.concatenate(parts).astype(np.float64)
            for parts in zip(*jax.device_get(found), strict=True)
        )
        there = targets > 0
        measures = {}
        data = self.held_out[which]
        if outputs:
            recipe = data.recipe
            answers = [recipe.answer_of(float(x)) for x in outputs[0][there]]
            measures = recipe.metrics(answers, data.examples)
        elif self.task.metric:
            examples = self._scored(data)
            answers = self._preferred(arm, config, frozen, adapter, which)
            measures = data.recipe.metrics(answers, examples)
        return Measured(losses=losses[there], targets=targets[there], measures=measures)

    def _preferred(
        self,
        arm: ArmSettings,
        config: RunConfig,
        frozen: Tree,
        adapter: AdapterState,
        which: str,
    ) -> list[str]:
        """The choices that a language model holds likeliest."""
        assert isinstance(self.model, CausalLM)
        model, spec, data = self.model, self.spec(config), self.held_out[which]
        if arm.name not in self._preferences:
            self._preferences[arm.name] = jax.jit(
                lambda frozen, adapter, rows: choice_log_likelihood(
                    model, spec.bind(frozen, adapter), rows
                )
            )
        prefer = self._preferences[arm.name]
        examples = self._scored(data)
        rows = choice_rows(examples, data.encoder)
        scores = [
            prefer(frozen, adapter, jax.tree.map(jnp.asarray, part))
            for part in choice_parts(rows, config.train.batch_size)
        ]
        return preferred_answers(np.concatenate(jax.device_get(scores)), examples)

    def forgetting(self, config: RunConfig, adapter: AdapterState) -> float | None:
        """How far the adapted model has gone from the base on text that the base is at home with.

        For a causal model the loss on text the base wrote itself, less the base's own, in nats a
        token. For an encoder one less the cosine of a text's mean hidden states before and after;
        None where the task names no texts.
        """
        if not isinstance(self.model, CausalLM) and not self.task.own_text:
            return None
        params = self.params(config.seed)
        if self._own is None:
            self._own = _own_text(self, params)
        return self._own(self.spec(config).bind(params, adapter)) - self._own(params)


def row_losses(
    model: Any,
    spec: AdapterSpec,
    chunk_size: int,
    frozen: Tree,
    adapter: AdapterState,
    batch: AnyBatch,
) -> tuple[Float[Array, " rows"], ...]:
    """Each row's summed loss and number of targets; a classifier's answers as well."""
    bound = spec.bind(frozen, adapter)
    if isinstance(batch, LabeledBatch):
        outputs, losses = classifier_outputs(model, bound, batch)
        values = outputs[:, 0] if model.num_labels == 1 else jnp.argmax(outputs, axis=-1)
        return losses, batch.loss_mask, values.astype(jnp.float32)
    hidden, _ = model.hidden_states(
        bound, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    scores, _ = chunked_token_scores(
        hidden.reshape(-1, hidden.shape[-1]),
        model.head_kernel(bound),
        batch.targets.reshape(-1),
        chunk_size=chunk_size,
    )
    losses = -scores.reshape(batch.tokens.shape) * batch.loss_mask
    return losses.sum(axis=-1), batch.loss_mask.sum(axis=-1)


def _own_text(bench: Bench, params: Tree) -> Any:
    """A function from parameters to how badly they know the base's own text."""
    if isinstance(bench.model, CausalLM):
        return _story_loss(bench, bench.model, params)
    return _embedding_drift(bench, params)


def _story_loss(bench: Bench, model: CausalLM, params: Tree) -> Any:
    """The loss on texts that the base writes at temperature 1 from its begin token."""
    start = np.asarray(bench.tokenizer("")["input_ids"] or [bench.tokenizer.bos_token_id], np.int32)
    settings = GenerationSettings(
        max_new_tokens=_OWN_TOKENS, temperature=1.0, seed=0, batch_size=bench.task.own_texts
    )
    written = generate(model, params, [start] * bench.task.own_texts, settings)
    texts = [np.concatenate([start, one.tokens]) for one in written.completions]
    tokens, segments = _padded(texts)

    @jax.jit
    def loss(bound: Tree) -> jax.Array:
        logits = model(bound, tokens[:, :-1], segment_ids=segments[:, :-1])
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[..., 0]
        mask = segments[:, 1:].astype(jnp.float32)
        return -jnp.sum(chosen * mask) / jnp.sum(mask)

    return lambda bound: float(loss(bound))


def _embedding_drift(bench: Bench, params: Tree) -> Any:
    """One less the cosine between a text's mean hidden states and the base's, mean over texts."""
    lines = Path(bench.task.own_text).read_text(encoding="utf-8").splitlines()
    model: Any = bench.model
    length = model.max_tokens
    ids = [
        np.asarray(bench.tokenizer(line, truncation=True, max_length=length)["input_ids"], np.int32)
        for line in lines[: bench.task.own_texts]
    ]
    tokens, segments = _padded(ids)

    @jax.jit
    def embed(bound: Tree) -> jax.Array:
        hidden = model.hidden_states(bound, tokens, segment_ids=segments)
        mask = segments[..., None].astype(hidden.dtype)
        mean = jnp.sum(hidden * mask, axis=1) / jnp.sum(mask, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    base = embed(params)
    return lambda bound: float(jnp.mean(1.0 - jnp.sum(embed(bound) * base, axis=-1)))


def _padded(texts: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Token rows [B, T] and their segments, 0 for padding."""
    longest = max(map(len, texts))
    tokens, segments = np.zeros((2, len(texts), longest), np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
        segments[row, : len(ids)] = 1
    return jnp.asarray(tokens), jnp.asarray(segments)
