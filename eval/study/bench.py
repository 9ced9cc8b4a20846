"""Loads a task's model and data and compiles its programs, which all of its cells share."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.adapters.method import StartFactors
from peft_jax.core import Path as TreePath
from peft_jax.core import Tree
from peft_jax.data import AnyBatch, DataSettings, EvalData, build_data
from peft_jax.data.examples import Example
from peft_jax.data.totals import RowTotals
from peft_jax.generation import GenerationSettings, generate
from peft_jax.hub import load_params
from peft_jax.models import CausalLM, SequenceClassifier
from peft_jax.parallel import on_mesh
from peft_jax.training import RunConfig, TrainState
from peft_jax.training.blueprint import Blueprint, draw_blueprint
from peft_jax.training.evaluate import (
    choice_log_likelihood,
    choice_parts,
    choice_rows,
    preferred_answers,
)
from peft_jax.training.losses import chunked_token_scores
from peft_jax.training.prepare import prepare, train_head
from peft_jax.training.program import step_bytes

from .measuring import RowMeasures, calibration, measure_rows
from .settings import ArmSettings, TaskSettings
from .trial_optimizer import trial_optimizer
from .trials import Trial

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
      calibration: Expected calibration error, mean confidence and accuracy of the answers: labels,
        or a language model's likeliest tokens at the targets.
    """

    losses: np.ndarray
    targets: np.ndarray
    measures: dict[str, float]
    calibration: dict[str, float]

    @property
    def loss(self) -> float:
        """Returns the mean loss over all targets."""
        return float(self.losses.sum() / self.targets.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Training step of an arm, compiled once for all trials and seeds.

    Attributes:
      blueprint: Program of a run, whose learning rates are part of the state; see
        `trial_optimizer`.
      step: Compiled step.
      make_state: Makes the initial state; donates the trainable arrays.
      step_bytes: Memory of a step per device in bytes, as the compiler counts it.
    """

    blueprint: Blueprint
    step: jax.stages.Compiled
    make_state: Callable[[Tree], TrainState]
    step_bytes: int


class Bench:
    """Model, data and programs of a task, loaded once for all cells.

    Args:
      task: Settings of the task.
      arm: Any of the arms; what is loaded does not depend on it.

    Attributes:
      task: Settings of the task.
      model: Model, with the head that the task needs.
      tokenizer: Tokenizer of the model.
      held_out: Rows that trials are chosen on, "tuning", and rows of the final measurement, "test".
    """

    def __init__(self, task: TaskSettings, arm: ArmSettings):
        self.task = task
        config = task.run_config(arm, Trial(1.0), seed=0)
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
        self._totals: dict[int, RowTotals] = {}
        self._blueprints: dict[str, Blueprint] = {}
        self._programs: dict[str, Program] = {}
        self._evaluations: dict[str, Any] = {}
        self._preferences: dict[str, Any] = {}
        self._factors: dict[Hashable, dict[TreePath, StartFactors]] = {}
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

    @property
    def chunk_size(self) -> int:
        """Number of positions whose logits are held at once."""
        return self._config.train.loss_chunk

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
            self._totals[seed] = train.totals
            train.close()
        return self._batches[seed]

    def steps(self, config: RunConfig) -> int:
        """Returns the number of steps of a run, which is less for a short tuning run."""
        return config.train.steps or self._steps

    def totals(self, seed: int) -> RowTotals:
        """Returns the counts of the training rows of a seed, of those that were looked at."""
        self.batches(seed)
        return self._totals[seed]

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
        # Without packing, a row is one example, as the bootstrap over examples needs.
        changes = {"hold_out": None, "packing": False, **self.task.test}
        train, test = self._build(dataclasses.replace(config.data, **changes), 0)
        train.close()
        return test

    # Parameters.

    def params(self, seed: int) -> Tree:
        """Loads the base model's parameters; only a new head depends on the seed."""
        return self._load(seed if self._new_head else None)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _load(self, head_seed: int | None) -> Tree:
        key = None if head_seed is None else jax.random.fold_in(jax.random.key(head_seed), 2)
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
        blueprint = self.blueprint(arm, config)
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        with on_mesh(blueprint.mesh):
            factors = self._start_factors(blueprint, config, key)
            return blueprint.initialize(key, self.params(config.seed), factors=factors)

    def _start_factors(
        self, blueprint: Blueprint, config: RunConfig, key: jax.Array
    ) -> dict[TreePath, StartFactors]:
        """Estimates what adapters start from, once for the same ranks on the same kernels."""
        ranks = blueprint.spec.start_ranks(blueprint.params)
        if not ranks:
            return {}
        of_inputs = blueprint.spec.method.input_rank > 0
        start = (config.seed, config.init_batches, config.init_passes, of_inputs)
        place = (*start, frozenset(ranks.items()))
        if place not in self._factors:
            batches = self.batches(config.seed)[: blueprint.init_batches]
            self._factors[place] = blueprint.start_factors(
                key, self.params(config.seed), blueprint.init_microbatches(batches)
            )
        return self._factors[place]

    # Programs.

    def blueprint(self, arm: ArmSettings, config: RunConfig) -> Blueprint:
        """Returns the arm's program, not compiled, which all trials and seeds share.

        Every cell has the dropout of seed 0, because the seed is part of the program.
        """
        if arm.name not in self._blueprints:
            mixing = config.mixing if config.spec.method.branches else None
            self._blueprints[arm.name] = draw_blueprint(
                dataclasses.replace(config, seed=0),
                self.model,
                self._mesh,
                spec=self.spec(config),
                optimizer=trial_optimizer(config.applied_optimizer, self._steps, mixing=mixing),
            )
        return self._blueprints[arm.name]

    def program(self, arm: ArmSettings, config: RunConfig) -> Program:
        """Returns the arm's step, compiled once for all trials and seeds."""
        if arm.name not in self._programs:
            blueprint = self.blueprint(arm, config)
            compiled = blueprint.trace_step().lower().compile()
            self._programs[arm.name] = Program(
                blueprint=blueprint,
                step=compiled,
                make_state=blueprint.jit_make_state(),
                step_bytes=step_bytes(compiled) or 0,
            )
        return self._programs[arm.name]

    # Measuring.

    def measure(
        self, arm: ArmSettings, config: RunConfig, adapter: AdapterState, which: str
    ) -> Measured:
        """Measures the held-out rows "tuning" or "test"."""
        frozen = self.spec(config).frozen(self.params(config.seed))
        found = self._measured_rows(arm, config, frozen, adapter, self._rows[which])
        there = found.targets > 0
        data = self.held_out[which]
        measures = {}
        if found.answers is not None:
            answers = [data.recipe.answer_of(float(x)) for x in found.answers[there]]
            measures = data.recipe.metrics(answers, data.examples)
        elif self.task.metric:
            examples = self._scored(data)
            answers = self._preferred(arm, config, frozen, adapter, which)
            measures = data.recipe.metrics(answers, examples)
        return Measured(
            losses=np.asarray(found.losses, np.float64)[there],
            targets=np.asarray(found.targets, np.float64)[there],
            measures=measures,
            calibration=calibration(found.bins),
        )

    def curve_loss(self, arm: ArmSettings, config: RunConfig, adapter: AdapterState) -> float:
        """Measures the loss on the task's `curve_rows` first tuning rows, for learning curves."""
        frozen = self.spec(config).frozen(self.params(config.seed))
        batches = -(-self.task.curve_rows // config.train.batch_size)
        found = self._measured_rows(arm, config, frozen, adapter, self._rows["tuning"][:batches])
        return float(found.losses.sum() / found.targets.sum())

    def base_loss(self) -> float | None:
        """Measures the base model's loss on the test rows; None if it has no head for them."""
        if self._new_head:
            return None
        params = self.params(0)
        measure = functools.partial(measure_rows, self.model, chunk_size=self.chunk_size)
        evaluate = jax.jit(measure)
        found = [jax.device_get(evaluate(params, rows)) for rows in self._rows["test"]]
        targets = sum(float(part.targets.sum()) for part in found)
        return sum(float(part.losses.sum()) for part in found) / targets

    def _measured_rows(
        self,
        arm: ArmSettings,
        config: RunConfig,
        frozen: Tree,
        adapter: AdapterState,
        batches: Sequence[AnyBatch],
    ) -> RowMeasures:
        """Returns the measurements of batches, joined into one of numpy arrays."""
        if arm.name not in self._evaluations:
            model, spec, chunk = self.model, self.spec(config), config.train.loss_chunk
            self._evaluations[arm.name] = jax.jit(
                lambda frozen, adapter, rows: measure_rows(
                    model, spec.bind(frozen, adapter), rows, chunk_size=chunk
                )
            )
        evaluate = self._evaluations[arm.name]
        parts = jax.device_get([evaluate(frozen, adapter, rows) for rows in batches])
        answers = None
        if parts[0].answers is not None:
            answers = np.concatenate([part.answers for part in parts])
        return RowMeasures(
            losses=np.concatenate([part.losses for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
            answers=answers,
            bins=np.sum([part.bins for part in parts], axis=0),
        )

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
    chunk = bench.chunk_size

    @jax.jit
    def loss(bound: Tree) -> jax.Array:
        hidden, _ = model.hidden_states(bound, tokens[:, :-1], segment_ids=segments[:, :-1])
        scores, _ = chunked_token_scores(
            hidden.reshape(-1, hidden.shape[-1]),
            model.head_kernel(bound),
            tokens[:, 1:].reshape(-1),
            chunk_size=chunk,
        )
        mask = segments[:, 1:].astype(jnp.float32).reshape(-1)
        return -jnp.sum(scores * mask) / jnp.sum(mask)

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
