"""Training in memory: a model, an adapter, any optax transformation and any batches.

    trainer = Trainer(model, AdapterSpec(LoRA(rank=8)), optax.adamw(1e-3))
    training = trainer.fit(params, batches)
    merged = trainer.spec.merge(params, training.adapter)

`fit` is `initialise`, then `step` for each batch; a loop of one's own calls the same two.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.adapters import AdapterSpec, AdapterState
from peft_jax.core import Tree
from peft_jax.core.checks import check_positive_int
from peft_jax.models import Model
from peft_jax.parallel import MeshSettings, make_mesh, on_mesh
from peft_jax.training.program import StepProgram, Training, lay_out, place_rows
from peft_jax.training.step import LossFn, Metrics, TrainStep, summed_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions that `Trainer.fit` calls; each is optional.

    Attributes:
      on_step: Called after each step with its number, from 1, and its metrics. They are on the
        device: reading one waits for the step, which costs time when it is done at every step.
      evaluate_every: Number of steps between two evaluations; 0 evaluates after the last step only.
      on_evaluation: Called with the number of steps taken and the held-out loss.
      checkpoint_every: Number of steps between two calls of `on_checkpoint`; 0 calls it after the
        last step only.
      on_checkpoint: Called with the number of steps taken and the `Training`. What it keeps must be
        copied or written before it returns: the next step reuses the buffers.
    """

    on_step: Callable[[int, Metrics], None] | None = None
    evaluate_every: int = 0
    on_evaluation: Callable[[int, float], None] | None = None
    checkpoint_every: int = 0
    on_checkpoint: Callable[[int, Training], None] | None = None


class Trainer:
    """Trains an adapter in memory.

    Args:
      model: The model.
      spec: What is adapted.
      optimizer: Any optax transformation, its learning rate included.
      loss_fn: A custom loss; see `peft_jax.training.step.LossFn`. None for cross-entropy over the
        targets of a `Batch` (or of a `LabelledBatch`, with a classifier).
      gradient_accumulation: Number of microbatches that a batch is divided into.
      chunk_size: Number of positions whose logits are held at once.
      packed: Whether rows may hold several segments; see `CausalLM.hidden_states`.
      mesh: The devices; by default all of them, with the rows of a batch divided among them.
      seed: Seed of the adapter's first values and of dropout.

    Raises:
      ValueError: `gradient_accumulation` is not a positive number.

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
        model: Model,
        spec: AdapterSpec,
        optimizer: optax.GradientTransformation,
        *,
        loss_fn: LossFn | None = None,
        gradient_accumulation: int = 1,
        chunk_size: int = 1024,
        packed: bool = True,
        mesh: jax.sharding.Mesh | None = None,
        seed: int = 0,
    ):
        check_positive_int("gradient_accumulation", gradient_accumulation)
        check_positive_int("chunk_size", chunk_size)
        self.model, self.spec, self.optimizer = model, spec, optimizer
        self._loss_fn = loss_fn
        self._accumulation = gradient_accumulation
        self._chunk_size, self._packed, self._seed = chunk_size, packed, seed
        self._mesh = make_mesh(MeshSettings()) if mesh is None else mesh
        self._program: StepProgram | None = None
        self._train_step: TrainStep | None = None
        self._step: Any = None
        self._evaluate: Any = None

    @property
    def traces(self) -> int:
        """Number of times the step has been traced; 1 unless batches change their shapes."""
        return 0 if self._train_step is None else self._train_step.traces

    def prepare(self, params: Tree) -> StepProgram:
        """Checks that the model can be trained so, and lays the arrays of a step out.

        Args:
          params: The model's parameters, arrays or shapes.

        Raises:
          ValueError: What is to be adapted cannot be, or the mesh does not divide the model.
        """
        layout = lay_out(self.model, self.spec, self.optimizer, self._mesh, params=params)
        self._program = StepProgram(
            model=self.model,
            spec=self.spec,
            params=layout.params,
            constant=layout.constant,
            state=layout.state,
            optimizer=self.optimizer,
            learning_rate=None,
            mesh=self._mesh,
            placement=place_rows(self._mesh),
            chunk_size=self._chunk_size,
            seed=self._seed,
            packed=self._packed,
            loss_fn=self._loss_fn,
        )
        self._train_step = self._program.train_step()
        self._step = self._program.jit_step(self._train_step)
        self._evaluate = jax.jit(self._loss)
        return self._program

    def initialise(
        self,
        params: Tree,
        batches: Iterable[Any] = (),
        *,
        adapter: AdapterState | None = None,
    ) -> Training:
        """Makes the arrays of a run.

        Args:
          params: The model's parameters. They are not copied where they lie as the mesh asks, and
            never changed.
          batches: Batches that show the gradient's directions to methods that start along them
            (`LoRAGA`, `Hybrid`).
          adapter: The adapter to start from; a new one by default.

        Raises:
          ValueError: As `prepare`; or the method starts along the gradient and no batch is given.
        """
        program = self.prepare(params)
        placed = jax.tree.map(
            lambda x, leaf: jax.device_put(x, leaf.sharding), params, program.params
        )
        with on_mesh(self._mesh):
            if adapter is None:
                rows = [piece for batch in batches for piece in self._microbatches(batch)]
                key = jax.random.key(self._seed)
                adapter = program.initialise(key, placed, rows or None)
            else:
                # The first step takes the buffers.
                adapter = program.place(jax.tree.map(jnp.copy, adapter))
            state = program.make_state(adapter.trainable)
        frozen = self.spec.frozen(placed)
        return Training(frozen=frozen, constant=adapter.constant, state=state)

    def step(self, training: Training, batch: Any) -> Metrics:
        """Takes one optimizer step, replacing `training.state`.

        Args:
          training: What `initialise` made.
          batch: Rows: a `Batch`, or with a custom loss any pytree whose leaves have a leading axis
            of rows.

        Returns:
          The metrics of the step, on the device; see `TrainStep`.

        Raises:
          ValueError: The rows cannot be divided equally.
        """
        program = self._prepared()
        self._check_rows(batch)
        placed = program.placement.put_microbatches(batch, self._accumulation)
        with on_mesh(self._mesh):
            training.state, metrics = self._step(
                training.state, training.frozen, training.constant, placed
            )
        return metrics

    def evaluate(self, training: Training, batches: Iterable[Any]) -> float:
        """Returns the mean loss over all targets of the batches.

        Raises:
          ValueError: There are no batches, or their rows cannot be divided equally.
        """
        program = self._prepared()
        total = weight = 0.0
        for batch in batches:
            self._check_rows(batch)
            with on_mesh(self._mesh):
                found = self._evaluate(
                    training.frozen, training.adapter, program.placement.put(batch)
                )
            total, weight = total + float(found[0]), weight + float(found[1])
        if not weight:
            raise ValueError("there is nothing to evaluate: no batch has a target")
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
          params: The model's parameters.
          batches: The batches.
          steps: Number of steps; by default as many as there are batches.
          held_out: Batches to evaluate; gone through once an evaluation.
          hooks: What is called in between.
          init_batches: As `initialise` takes them.

        Returns:
          The trained arrays.

        Raises:
          ValueError: As `initialise` and `step`; or the batches end before `steps`.
        """
        hooks, held_out = hooks or Hooks(), list(held_out)
        training = self.initialise(params, init_batches)
        done = 0
        for batch in itertools.islice(batches, steps):
            self._between(training, done, held_out, hooks)
            metrics = self.step(training, batch)
            done += 1
            if hooks.on_step is not None:
                hooks.on_step(done, metrics)
        if steps is not None and done < steps:
            raise ValueError(f"the batches end after {done} of {steps} steps")
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
        """Calls what is due after `done` steps."""
        measure = last or _is_due(done, hooks.evaluate_every)
        save = last or _is_due(done, hooks.checkpoint_every)
        if measure and held_out and hooks.on_evaluation is not None:
            hooks.on_evaluation(done, self.evaluate(training, held_out))
        if save and hooks.on_checkpoint is not None:
            hooks.on_checkpoint(done, training)

    def _loss(self, frozen: Tree, adapter: AdapterState, batch: Any) -> tuple[Any, Any]:
        bound = self.spec.bind(frozen, adapter)
        if self._loss_fn is not None:
            return self._loss_fn(self.model, bound, batch)
        return summed_loss(
            self.model, bound, batch, chunk_size=self._chunk_size, packed=self._packed
        )

    def _microbatches(self, batch: Any) -> list[Any]:
        self._check_rows(batch)
        count = self._accumulation

        split = jax.tree.map(lambda leaf: np.split(np.asarray(leaf), count), batch)
        outer, inner = jax.tree.structure(batch), jax.tree.structure([0] * count)
        return jax.tree.transpose(outer, inner, split)

    def _check_rows(self, batch: Any) -> None:
        """Rejects batches whose rows cannot be divided among microbatches and devices."""
        rows = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
        if len(rows) != 1:
            raise ValueError(
                f"the arrays of a batch must have the same number of rows, but have {sorted(rows)}"
            )
        (count,) = rows
        parts = self._accumulation * self._prepared().placement.parts
        if count % parts:
            raise ValueError(
                f"a batch has {count} rows, which {self._accumulation} microbatches on"
                f" {parts // self._accumulation} devices cannot share equally; the number must be"
                f" a multiple of {parts}"
            )

    def _prepared(self) -> StepProgram:
        if self._program is None:
            raise ValueError("call initialise before a step is taken")
        return self._program


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
