"""Loads a task's model and data and compiles its programs, which all of its cells share."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Hashable, Sequence
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
"""Number of tokens of each text that the base model generates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of a model on a fixed set of rows, in the data's order.

    Attributes:
      losses: float64 [n], summed loss of each row.
      targets: float64 [n], number of targets of each row.
      measures: Metrics of the recipe over all rows, of an encoder's answers or a language model's
        most likely choices; empty if the task names none.
    """

    losses: np.ndarray
    targets: np.ndarray
    measures: dict[str, float]

    @property
    def loss(self) -> float:
        """Returns the mean loss over all targets."""
        return float(self.losses.sum() / self.targets.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Training step of an arm, compiled once for all learning rates and seeds.

    Attributes:
      blueprint: Program of a run, whose learning rate is part of the state; see `with_rate`.
      step: Compiled step.
      make_state: Makes the initial state; donates the trainable arrays.
      step_bytes: Memory of a step per device in bytes, as the compiler counts it.
    """

    blueprint: Blueprint
    step: jax.stages.Compiled
    make_state: Callable[[Tree], TrainState]
    step_bytes: int


def with_rate(
    inner: optax.GradientTransformationExtraArgs, rate: float, settled: Collection[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of `inner` by a learning rate in the state, a scalar.

    A constant learning rate would need a new compilation for each value. `inner` must be built for
    a learning rate of 1, which is the last factor of its updates. The components in `settled` have
    their own rates in `inner`, and keep them.
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
    """Model, data and programs of a task, loaded once for all cells.

    Args:
      task: Settings of the task.
      arm: Any of the arms; what is loaded does not depend on it.

    Attributes:
      task: Settings of the task.
      model: Model, with the head that the task needs.
      tokenizer: Tokenizer of the model.
      held_out: Rows that learning rates are chosen on, "tuning", and rows of the final
        measurement, "test".
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
        self._factors: dict[Hashable, dict[TreePath, GradientFactors]] = {}
        self._own: Any = None
        self._check_metric()

    def _check_metric(self) -> None:
        """Rejects a metric that the task's test rows do not have, with ValueError."""
        metric, data = self.task.metric, self.held_out["test"]
        examples = self._scored(data)
        known = data.recipe.metrics([example.answer for example in examples], examples)
        if metric and metric not in known:
            names = ", ".join(known) or "none, because its answers have no choices"
            raise ValueError(
                f"task {self.task.name!r}: metric is {metric!r}, but the metrics of recipe"
                f" {data.recipe.name!r} are {names}"
            )

    # Data.

    def _scored(self, data: EvalData) -> Sequence[Example]:
        """Returns the examples whose answers are measured: for a language model, with choices."""
        if isinstance(self.model, SequenceClassifier):
            return data.examples
        return [example for example in data.examples if example.choices]

    def batches(self, seed: int) -> list[AnyBatch]:
        """Returns the batches of all steps, which are the same for every arm."""
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
        # Without packing, a row is one example, as the significance test over examples needs.
        changes = {"hold_out": None, "packing": False, **self.task.test}
        train, test = self._build(dataclasses.replace(config.data, **changes), 0)
        train.close()
        return test

    # Parameters.

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def params(self, seed: int) -> Tree:
        """Loads the base model's parameters; a new head depends only on the seed."""
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
        """Returns the adapter's specification, which includes a new head."""
        return train_head(config.spec, self.model)

    def initialize(self, arm: ArmSettings, config: RunConfig) -> AdapterState:
        """Initializes the adapter as a run of `config` does."""
        blueprint = self.program(arm, config).blueprint
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        with on_mesh(blueprint.mesh):
            factors = self._gradient_factors(blueprint, config, key)
            return blueprint.initialize(key, self.params(config.seed), factors=factors)

    def _gradient_factors(
        self, blueprint: Blueprint, config: RunConfig, key: jax.Array
    ) -> dict[TreePath, GradientFactors]:
        """Estimates gradients; arms with the same ranks on the same kernels share them."""
        ranks = blueprint.spec.gradient_ranks(blueprint.params)
        if not ranks:
            return {}
        start = (config.seed, config.init_batches, config.init_passes)
        place = (*start, frozenset(ranks.items()))
        if place not in self._factors:
            batches = self.batches(config.seed)[: blueprint.init_batches]
            self._factors[place] = blueprint.gradient_factors(
                key, self.params(config.seed), blueprint.init_microbatches(batches)
            )
        return self._factors[place]

    # Programs.

    def program(self, arm: ArmSettings, config: RunConfig) -> Program:
        """Returns the arm's step, compiled once for all learning rates and seeds.

        Every cell has the dropout of seed 0, because the seed is part of the program.
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
        """Measures the held-out rows "tuning" or "test"."""
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
        """Returns the choices that are most likely under a language model."""
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
        """Measures forgetting on text that the base model knows.

        For a causal model, it is the increase of the loss on the base model's own text, in nats per
        token. For an encoder, it is 1 minus the cosine between the mean hidden states of a text
        before and after training, or None if the task names no texts.
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
    """Returns each row's summed loss, number of targets and, for a classifier, answer."""
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
    """Returns a function from parameters to a loss on text that the base model knows."""
    if isinstance(bench.model, CausalLM):
        return _story_loss(bench, bench.model, params)
    return _embedding_drift(bench, params)


def _story_loss(bench: Bench, model: CausalLM, params: Tree) -> Any:
    """Returns the loss on the base model's own text, sampled at temperature 1."""
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
    """Returns 1 minus the cosine of mean hidden states to the base model's, averaged over texts."""
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
    """Returns token rows [B, T] and their segment ids, 0 for padding."""
    longest = max(map(len, texts))
    tokens, segments = np.zeros((2, len(texts), longest), np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
        segments[row, : len(ids)] = 1
    return jnp.asarray(tokens), jnp.asarray(segments)
