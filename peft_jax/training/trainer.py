"""Trains in memory, with any optax transformation and any batches.

    trainer = Trainer(model, AdapterSpec(LoRA(rank=8)), optax.adamw(1e-3))
    training = trainer.fit(params, batches)
    merged = trainer.spec.merge(params, training.adapter)

`fit` calls `initialize` and then `step` for each batch. A custom loop calls the same two.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.adapters.sketch import check_passes
from peft_jax.core import Tree, flatten
from peft_jax.core.validation import check_count, check_positive_int
from peft_jax.data import Batch, LabeledBatch
from peft_jax.models import Model, SequenceClassifier, TrainableModel, quantization_of
from peft_jax.parallel import LogicalAxisRules, MeshSettings, active_rules, make_mesh, on_mesh
from peft_jax.training.program import StepProgram, Training, lay_out, place_rows
from peft_jax.training.step import LossFn, Metrics, TrainStep, call_loss, summed_loss

_NO_TARGET = "there is nothing to evaluate: no batch has a target"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions that `Trainer.fit` calls; each is optional.

    Attributes:
      on_step: Called after each step with its number, from 1, and its metrics. Metrics are on the
        device: reading them waits for the step, which is slow if done at every step.
      evaluate_every: Number of steps between two evaluations; 0 only evaluates after the last step.
      on_evaluation: Called with the number of steps taken and the held-out loss.
      checkpoint_every: Number of steps between two calls of `on_checkpoint`; 0 only calls it after
        the last step.
      on_checkpoint: Called with the number of steps taken and the `Training`. It must copy or write
        arrays before it returns, because the next step donates their buffers.
    """

    on_step: Callable[[int, Metrics], None] | None = None
    evaluate_every: int = 0
    on_evaluation: Callable[[int, float], None] | None = None
    checkpoint_every: int = 0
    on_checkpoint: Callable[[int, Training], None] | None = None

    def __post_init__(self) -> None:
        check_count("evaluate_every", self.evaluate_every)
        check_count("checkpoint_every", self.checkpoint_every)


class Trainer:
    """Trains an adapter in memory.

    Args:
      model: Model to train.
      spec: Specification of the adapter.
      optimizer: Any optax transformation, including its learning rate.
      loss_fn: Custom loss; see `peft_jax.training.step.LossFn`. None for the cross-entropy over the
        targets of a `Batch`, or of a `LabeledBatch` with a classifier.
      gradient_accumulation: Number of microbatches of a batch.
      chunk_size: Number of positions whose logits are held at once.
      packed: Whether rows may have several segments; see `CausalLM.hidden_states`.
      mesh: Mesh of devices. Default: all devices, with batch rows sharded over them.
      rules: Mesh axes by logical axis. Default: those of the enclosing `on_mesh`, if any.
      seed: Seed of the adapter's initialization and of dropout.
      init_passes: Number of backward passes over the batches of `initialize`; see
        `peft_jax.adapters.gradient_factors` and `peft_jax.adapters.input_factors`.

    Raises:
      ValueError: `gradient_accumulation` or `chunk_size` is not a positive integer, or
        `init_passes` is neither 1 nor even.

    Example:
      >>> from peft_jax.adapters import LoRA
      >>> from peft_jax.data import Batch
      >>> from peft_jax.models import build_model
      >>> model = build_model({
      ...     "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1,
      ...     "num_attention_heads": 2, "intermediate_size": 16})
      >>> params = model.init_params(jax.random.key(0))
      >>> trainer = Trainer(model, AdapterSpec(LoRA(rank=2)), optax.adam(1e-2))
      >>> rows = np.arange(8 * 12).reshape(8, 12) % 32
      >>> training = trainer.fit(params, [Batch.from_tokens(rows)] * 3)
      >>> int(training.state.step), trainer.traces
      (3, 1)
    """

    def __init__(
        self,
        model: TrainableModel,
        spec: AdapterSpec,
        optimizer: optax.GradientTransformation,
        *,
        loss_fn: LossFn | None = None,
        gradient_accumulation: int = 1,
        chunk_size: int = 1024,
        packed: bool = True,
        mesh: jax.sharding.Mesh | None = None,
        rules: LogicalAxisRules | None = None,
        seed: int = 0,
        init_passes: int = 1,
    ):
        check_positive_int("gradient_accumulation", gradient_accumulation)
        check_positive_int("chunk_size", chunk_size)
        check_passes("init_passes", init_passes)
        if loss_fn is None and not isinstance(model, Model):
            raise ValueError(
                f"loss_fn is None, but {model.model_type} has no loss of its own; give loss_fn, a"
                " function of (model, params, batch)"
            )
        self.model, self.spec, self.optimizer = model, spec, optimizer
        self._loss_fn = loss_fn
        self._accumulation = gradient_accumulation
        self._chunk_size, self._packed, self._seed = chunk_size, packed, seed
        self._init_passes = init_passes
        self._mesh = make_mesh(MeshSettings()) if mesh is None else mesh
        # Kept, because the program is compiled once, perhaps in another context.
        self._rules = active_rules() if rules is None else rules
        self._program: StepProgram | None = None
        self._train_step: TrainStep | None = None
        self._step: Any = None
        self._evaluate: Any = None

    @property
    def traces(self) -> int:
        """Number of times the step has been traced; 1 unless the shapes of batches change."""
        return 0 if self._train_step is None else self._train_step.traces

    def prepare(self, params: Tree) -> StepProgram:
        """Checks the arguments, and shards the arrays of a step.

        Args:
          params: Model parameters, arrays or shapes.

        Raises:
          ValueError: The parameters are not the model's, a module cannot be adapted, or the mesh
            does not divide the model.
        """
        quantization = quantization_of(params)
        self.model.check_params(params, quantization)
        with on_mesh(self._mesh, self._rules):
            layout = lay_out(
                self.model,
                self.spec,
                self.optimizer,
                self._mesh,
                params=params,
                quantization=quantization,
            )
            placement = place_rows(self._mesh)
        self._program = StepProgram(
            model=self.model,
            spec=self.spec,
            params=layout.params,
            constant=layout.constant,
            state=layout.state,
            optimizer=self.optimizer,
            learning_rate=None,
            mesh=self._mesh,
            placement=placement,
            chunk_size=self._chunk_size,
            seed=self._seed,
            packed=self._packed,
            loss_fn=self._loss_fn,
            init_passes=self._init_passes,
        )
        self._train_step = self._program.train_step()
        self._step = self._program.jit_step(self._train_step)
        self._evaluate = jax.jit(self._loss)
        return self._program

    def initialize(
        self,
        params: Tree,
        batches: Iterable[Any] = (),
        *,
        adapter: AdapterState | None = None,
    ) -> Training:
        """Initializes the arrays of a run.

        Args:
          params: Model parameters. They are never changed. Frozen ones are not copied if they have
            the right sharding.
          batches: Batches for methods that initialize from the gradient (`LoRAGA`, `Hybrid`).
          adapter: Adapter to start from. Default: a new one.

        Raises:
          ValueError: `prepare` rejects the parameters, the method needs the gradient and no batch
            is given, or `adapter` belongs to another specification.
        """
        program = self.prepare(params)
        placed = program.place_base(params)
        with on_mesh(self._mesh, self._rules):
            if adapter is None:
                rows = [piece for batch in batches for piece in self._microbatches(batch)]
                key = jax.random.key(self._seed)
                adapter = program.initialize(key, placed, rows or None)
            else:
                _check_adapter(adapter, program.adapter)
                # Copied, because the first step donates the buffers.
                adapter = program.place(jax.tree.map(jnp.copy, adapter))
            state = program.make_state(adapter.trainable)
        return Training(frozen=self.spec.frozen(placed), constant=adapter.constant, state=state)

    def step(self, training: Training, batch: Any) -> Metrics:
        """Takes one optimizer step and replaces `training.state`.

        Args:
          training: Arrays from `initialize`.
          batch: A `Batch`, or with a custom loss any pytree of leaves [rows, ...].

        Returns:
          The metrics of the step, on the device; see `TrainStep`.

        Raises:
          ValueError: The rows cannot be divided equally.
        """
        program = self._prepared()
        self._check_rows(batch)
        placed = program.placement.put_microbatches(batch, self._accumulation)
        with on_mesh(self._mesh, self._rules):
            training.state, metrics = self._step(
                training.state, training.frozen, training.constant, placed
            )
        return metrics

    def evaluate(self, training: Training, batches: Iterable[Any]) -> float:
        """Returns the mean loss over all targets of the batches.

        Raises:
          ValueError: No batch has a target, or the rows cannot be divided equally.
        """
        program = self._prepared()
        total = weight = 0.0
        for batch in batches:
            self._check_rows(batch, microbatches=1)
            with on_mesh(self._mesh, self._rules):
                found = self._evaluate(
                    training.frozen, training.adapter, program.placement.put(batch)
                )
            total, weight = total + float(found[0]), weight + float(found[1])
        if not weight:
            raise ValueError(_NO_TARGET)
        return total / weight

    def fit(
        self,
        params: Tree,
        batches: Iterable[Any],
        *,
        steps: int | None = None,
        held_out: Iterable[Any] = (),
        hooks: Hooks | None = None,
        init_batches: Iterable[Any] = (),
    ) -> Training:
        """Trains on batches, one step each.

        Args:
          params: Model parameters.
          batches: Training batches.
          steps: Number of steps. Default: the number of batches.
          held_out: Held-out batches for `hooks.on_evaluation`.
          hooks: Functions to call between steps.
          init_batches: Batches for `initialize`. All of them are read before the first step.

        Returns:
          The trained arrays.

        Raises:
          ValueError: `initialize`, `step` or `evaluate` rejects an argument, or the batches end
            before `steps`. Held-out batches are checked before the first step.
        """
        if steps is not None:
            check_count("steps", steps)
        if init_batches is batches and isinstance(batches, Iterator):
            raise ValueError(
                "init_batches and batches are the same iterator, so no batch would be left to train"
                " on; give init_batches a list, such as list(itertools.islice(batches, 1))"
            )
        hooks, held_out = hooks or Hooks(), list(held_out)
        training = self.initialize(params, init_batches)
        self._check_held_out(held_out)
        done = 0
        for batch in itertools.islice(batches, steps):
            self._between(training, done, held_out, hooks)
            metrics = self.step(training, batch)
            done += 1
            if hooks.on_step is not None:
                hooks.on_step(done, metrics)
        if steps is not None and done < steps:
            raise ValueError(f"steps is {steps}, but there are only {done} batches")
        self._between(training, done, held_out, hooks, last=True)
        return training

    def _between(
        self,
        training: Training,
        done: int,
        held_out: list[Any],
        hooks: Hooks,
        *,
        last: bool = False,
    ) -> None:
        """Calls the hooks that are due after `done` steps."""
        measure = last or is_due(done, hooks.evaluate_every)
        save = last or is_due(done, hooks.checkpoint_every)
        if measure and held_out and hooks.on_evaluation is not None:
            hooks.on_evaluation(done, self.evaluate(training, held_out))
        if save and hooks.on_checkpoint is not None:
            hooks.on_checkpoint(done, training)

    def _loss(self, frozen: Tree, adapter: AdapterState, batch: Any) -> tuple[Any, Any]:
        bound = self.spec.bind(frozen, adapter)
        if self._loss_fn is not None:
            return call_loss(self._loss_fn, self.model, bound, batch)
        return summed_loss(
            self.model, bound, batch, chunk_size=self._chunk_size, packed=self._packed
        )

    def _microbatches(self, batch: Any) -> list[Any]:
        self._check_rows(batch)
        count = self._accumulation

        split = jax.tree.map(lambda leaf: np.split(np.asarray(leaf), count), batch)
        outer, inner = jax.tree.structure(batch), jax.tree.structure([0] * count)
        return jax.tree.transpose(outer, inner, split)

    def _check_rows(self, batch: Any, *, microbatches: int | None = None) -> None:
        """Rejects invalid batches, and rows that microbatches and devices cannot share equally."""
        if self._loss_fn is None:
            self._check_kind(batch)
        leaves = jax.tree.leaves(batch)
        if not leaves:
            raise ValueError(f"a batch must have arrays, but is {batch!r}")
        odd = next((leaf for leaf in leaves if not np.shape(leaf)), None)
        if odd is not None:
            raise ValueError(
                "the leaves of a batch must be arrays with a leading axis of rows, but one is"
                f" {odd!r}"
            )
        rows = {np.shape(leaf)[0] for leaf in leaves}
        if len(rows) != 1:
            raise ValueError(
                f"the arrays of a batch must have the same number of rows, but have {sorted(rows)}"
            )
        (count,) = rows
        microbatches = self._accumulation if microbatches is None else microbatches
        devices = self._prepared().placement.parts
        parts = microbatches * devices
        if not count or count % parts:
            raise ValueError(
                f"a batch has {count} rows, but the number must be a multiple of {parts}, so that"
                f" {microbatches} microbatches on {devices} devices share them equally"
            )

    def _check_held_out(self, held_out: list[Any]) -> None:
        """Rejects batches that `evaluate` would reject, before the first step."""
        for batch in held_out:
            self._check_rows(batch, microbatches=1)
        targets = self._loss_fn is not None or any(np.any(one.loss_mask) for one in held_out)
        if held_out and not targets:
            raise ValueError(_NO_TARGET)

    def _check_kind(self, batch: Any) -> None:
        """Rejects batches that the model's own loss does not accept.

        Values are only checked in host arrays.
        """
        wanted = LabeledBatch if isinstance(self.model, SequenceClassifier) else Batch
        if not isinstance(batch, wanted):
            raise ValueError(
                f"a batch must be a {wanted.__name__} without a custom loss_fn, but is a"
                f" {type(batch).__name__}"
            )
        assert isinstance(self.model, Model)
        size = self.model.config.vocab_size
        _check_range("tokens", batch.tokens, size, "model.config.vocab_size")
        if isinstance(batch, Batch) and isinstance(batch.loss_mask, np.ndarray):
            learned = np.asarray(batch.targets)[batch.loss_mask != 0]
            _check_range("targets", learned, size, "model.config.vocab_size")
        if isinstance(self.model, SequenceClassifier) and self.model.num_labels > 1:
            _check_range("labels", batch.labels, self.model.num_labels, "model.num_labels")

    def _prepared(self) -> StepProgram:
        if self._program is None:
            raise ValueError("there are no arrays yet; call initialize before step")
        return self._program


def _check_adapter(given: AdapterState, expected: AdapterState) -> None:
    """Rejects an adapter of another `AdapterSpec` or another model."""
    shapes = [
        {path: tuple(leaf.shape) for path, leaf in flatten(state.trainable).items()}
        for state in (given, expected)
    ]
    if shapes[0] == shapes[1]:
        return
    path = min(path for path, _ in shapes[0].items() ^ shapes[1].items())
    found, wanted = (one.get(path, "not there") for one in shapes)
    raise ValueError(
        f"the adapter does not fit this AdapterSpec: {'.'.join(path)} is {found}, but must be"
        f" {wanted}"
    )


def _check_range(name: str, values: Any, size: int, limit: str) -> None:
    """Rejects host values outside 0 to `size` - 1; reading a device's array would block."""
    if not isinstance(values, np.ndarray) or not values.size:
        return
    for found in (values.min(), values.max()):
        if not 0 <= found < size:
            raise ValueError(
                f"the {name} of a batch must be from 0 to {size - 1} ({limit} is {size}), but one"
                f" is {found:g}"
            )


def is_due(step: int, every: int) -> bool:
    """Returns whether `step` is one of every `every` steps; never if `every` is 0."""
    return every > 0 and step > 0 and step % every == 0
