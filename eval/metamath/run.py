"""Trains a method by the protocol, and measures it as the published table does."""

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from peft_jax.adapters import count_parameters
from peft_jax.core import Tree
from peft_jax.data import Batch
from peft_jax.data.recipes.metamath import is_right
from peft_jax.generation import GenerationSettings
from peft_jax.generation.from_text import generate_text_from_tokens
from peft_jax.hub import export_merged, find_folder, load_params, read_config, save_adapter
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import CausalLM, build_model
from peft_jax.optim import ScheduleSettings, make_optimizer
from peft_jax.parallel import make_mesh, on_mesh
from peft_jax.runtime.errors import RefusedError
from peft_jax.training import RunConfig, Trainer
from peft_jax.training.program import Training
from peft_jax.training.step import summed_loss

from .protocol import (
    ANSWERED_TOGETHER,
    MOST_NEW_TOKENS,
    MOST_TOKENS,
    batches_by_length,
    cosine_with_warmup,
    loss_function,
    make_batch,
)
from .questions import Question, Questions, read_questions
from .row import Measured, make_row, memory_in_use, write_row

_LATE = ("prodigy", "schedule_free_adamw")
"""Optimizers that need their own schedule, which is then that of the configuration."""


def run_metamath(
    config: RunConfig,
    workdir: Path,
    *,
    name: str,
    texts: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains and measures one method, and writes its row of the table.

    Args:
      config: Configuration, as of `configs/metamath.py`.
      workdir: Folder of `row.json` and `adapter/`.
      name: Name of the experiment in the row, "lora/llama-3.2-3B-rank32".
      texts: Texts on which forgetting is measured; empty: it is not measured.
      say: Prints progress.

    Returns:
      The row, as in `row.json`.

    Raises:
      RefusedError: The work directory has a row already, or the configuration does not suit.
    """
    _check(config, workdir)
    began, started = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    folder = find_folder(config.model.path, revision=config.model.revision or None)
    tokenizer = load_tokenizer(folder)
    train = config.train
    assert train.steps is not None  # `_check`
    try:
        questions = read_questions(
            config.data,
            tokenizer,
            steps=train.steps,
            batch_size=train.batch_size,
            max_length=train.max_length,
        )
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    model = dataclasses.replace(
        build_model(read_config(folder), config.execution), origin=str(folder)
    )
    mesh = make_mesh(config.parallel)
    trainer = Trainer(
        model,
        config.spec,
        protocol_optimizer(config),
        loss_fn=loss_function(train.loss_chunk),
        gradient_accumulation=train.gradient_accumulation,
        packed=False,
        mesh=mesh,
        seed=config.seed,
        init_passes=config.init_passes,
    )
    abstract = model.abstract_params(
        config.model.dtype, config.model.quantization, mesh.devices.flat[0].platform
    )
    program = trainer.prepare(abstract)
    count = count_parameters(program.spec, program.params, program.adapter)
    say(f"{count.trainable:,} of {count.total:,} parameters are trainable")
    params = load_params(
        folder,
        model,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        sharding=jax.tree.map(lambda leaf: leaf.sharding, program.params),
    )
    batches = _Batches(questions, tokenizer, train.batch_size)
    forgotten = _Forgetting(model, tokenizer, texts, train.max_length, mesh, train.loss_chunk)
    before = forgotten(params)
    training = trainer.initialize(params, [batches(at) for at in range(config.init_batches)])
    measured = Measured(trainable=count.trainable, total=count.total)
    run = _Run(config, model, tokenizer, mesh, questions, measured, say)
    run.train(trainer, training, batches)
    bound = config.spec.bind(training.frozen, training.adapter)
    accuracy = run.accuracy(bound, questions.test)
    after = forgotten(bound)
    measured.finish(
        accuracy, None if before is None or after is None else after - before, config.evaluate.every
    )
    say(f"test accuracy {accuracy:.4f}")
    with on_mesh(mesh):
        if config.spec.method.trains_base:
            export_merged(
                workdir / "model",
                model,
                training.frozen,
                config.spec,
                training.adapter,
                dtype=config.model.dtype,
            )
        else:
            save_adapter(
                workdir / "adapter", model, config.spec, training.adapter, config.model.path
            )
    row = make_row(
        config,
        measured,
        name=name,
        workdir=workdir,
        started=started,
        seconds=time.perf_counter() - began,
    )
    write_row(workdir, row)
    return row


def protocol_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Returns the optimizer of a configuration, with the protocol's own cosine schedule.

    That of the library differs: its first step has a rate above zero.
    """
    settings, steps = config.applied_optimizer, config.train.steps
    assert steps is not None
    mixing = config.mixing if config.spec.method.branches else None
    if settings.schedule.name != "cosine" or settings.name in _LATE:
        return make_optimizer(settings, steps, mixing=mixing)
    constant = dataclasses.replace(settings, schedule=ScheduleSettings(name="constant"))
    inner = make_optimizer(constant, steps, mixing=mixing)
    return optax.chain(inner, optax.scale_by_schedule(cosine_with_warmup(steps)))


def answer_questions(
    model: CausalLM,
    params: Tree,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = ANSWERED_TOGETHER,
) -> list[str]:
    """Returns each question's prompt with the answer that follows greedily.

    Args:
      model: Model.
      params: Parameters of the model, with adapters bound or merged.
      tokenizer: A transformers tokenizer.
      questions: Questions.
      batch_size: Number of questions in a batch.

    Source: run.py, evaluate.
    """
    prompts = [question.tokens for question in questions]
    longest = max(map(len, prompts))
    room = min(MOST_NEW_TOKENS, MOST_TOKENS - longest)
    if room < 1:
        raise RefusedError(
            f"a prompt has {longest} tokens, but prompt and answer have at most {MOST_TOKENS}"
        )
    settings = GenerationSettings(max_new_tokens=room, batch_size=min(batch_size, len(prompts)))
    found = generate_text_from_tokens(model, params, tokenizer, prompts, settings)
    return [
        tokenizer.decode([*prompt, *one.tokens.tolist()], skip_special_tokens=True)
        for prompt, one in zip(prompts, found.completions, strict=True)
    ]


class _Batches:
    """Maps steps, from 0, to the batches of a run."""

    def __init__(self, questions: Questions, tokenizer: Any, batch_size: int):
        self._rows = questions.train
        self._end = int(tokenizer.eos_token_id)
        lengths = [len(row) for row in questions.train]
        self._order = list(batches_by_length(lengths, batch_size))

    def __call__(self, step: int) -> dict[str, Any]:
        return make_batch([self._rows[index] for index in self._order[step]], self._end)


class _Run:
    """Training with measurements on the validation rows."""

    def __init__(
        self,
        config: RunConfig,
        model: CausalLM,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        questions: Questions,
        measured: Measured,
        say: Callable[[str], None],
    ):
        self._config = config
        self._model = model
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._questions = questions
        self._measured = measured
        self._say = say

    def train(self, trainer: Trainer, training: Training, batches: _Batches) -> None:
        """Takes all steps, with the measurements that are due."""
        steps, every = self._config.train.steps, self._config.evaluate.every
        assert steps is not None
        measured = self._measured
        for step in range(1, steps + 1):
            began = time.perf_counter()
            batch = batches(step - 1)
            loss = float(trainer.step(training, batch)["loss"])
            rows = len(batch["tokens"])
            tokens = int(np.sum(batch["tokens"])) + rows
            seconds = time.perf_counter() - began
            measured.add_step(loss, rows, tokens, seconds, memory_in_use())
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of step {step} is {loss}; lower train.learning_rate"
                )
            if every and step % every == 0:
                bound = self._config.spec.bind(training.frozen, training.adapter)
                began = time.perf_counter()
                accuracy = self.accuracy(bound, self._questions.validation)
                measured.add_validation(step, accuracy, every, time.perf_counter() - began)
                self._say(
                    f"step {step} of {steps}: loss {measured.mean_loss(every):.4f}, validation"
                    f" accuracy {accuracy:.3f}"
                )

    def accuracy(self, params: Tree, questions: Sequence[Question]) -> float:
        """Returns the share of questions whose generated answer is right."""
        with on_mesh(self._mesh):
            texts = answer_questions(self._model, params, self._tokenizer, questions)
        right = [
            is_right(text, question.solution)
            for text, question in zip(texts, questions, strict=True)
        ]
        return sum(right) / len(right)


class _Forgetting:
    """Measures the mean loss of a model over all tokens of given texts (run.py)."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        texts: Sequence[str],
        max_length: int,
        mesh: jax.sharding.Mesh,
        chunk_size: int,
    ):
        self._mesh = mesh
        rows = [tokenizer(text)["input_ids"][:max_length] for text in texts]
        self._batches = [_unmarked(rows[at : at + 4], max_length) for at in range(0, len(rows), 4)]
        self._loss = jax.jit(
            lambda params, batch: summed_loss(
                model, params, batch, chunk_size=chunk_size, packed=False
            )
        )

    def __call__(self, params: Tree) -> float | None:
        total = weight = 0.0
        for batch in self._batches:
            with on_mesh(self._mesh):
                found = self._loss(params, batch)
            total, weight = total + float(found[0]), weight + float(found[1])
        return total / weight if weight else None


def _unmarked(rows: Sequence[Sequence[int]], width: int) -> Batch:
    """Returns rows of tokens without end tokens, all predicted."""
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return Batch.from_tokens(tokens, lengths=[len(row) for row in rows])


def _check(config: RunConfig, workdir: Path) -> None:
    """Raises RefusedError for what the protocol cannot run."""
    if (workdir / "row.json").exists():
        raise RefusedError(f"{workdir} has a row already; give another --workdir")
    if jax.process_count() > 1:
        raise RefusedError("the comparison runs in one process; start it on one host")
    if config.train.steps is None:
        raise RefusedError("train.steps must be given, since the protocol counts steps")
    if config.adapter.path:
        raise RefusedError(
            f"adapter.path is {config.adapter.path!r}, but the comparison starts from new adapters"
        )
