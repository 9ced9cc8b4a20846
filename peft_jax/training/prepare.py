"""Everything a run needs, built and checked before any weight is loaded."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from peft_jax.adapters import AdapterSpec, ParameterCount, count_parameters, trainable_table
from peft_jax.cost.memory import check_fits, device_memory, gib
from peft_jax.data import EvalData, TrainData, build_data, get_recipe
from peft_jax.hub import find_folder, read_config
from peft_jax.hub.load import open_sources
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import (
    Model,
    SequenceClassifier,
    build_classifier,
    build_model,
    is_encoder,
)
from peft_jax.models.architectures import check_architecture
from peft_jax.parallel import make_mesh
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.blueprint import Blueprint, draw_blueprint
from peft_jax.training.config import RunConfig, check_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Blueprint):
    """What a run is made of, beside the program of its step; nothing in it is large.

    Attributes:
      folder: the checkpoint's folder.
      tokenizer: its transformers tokenizer.
      table: what is trained, to print.
      count: how many numbers are trained, and how many there are.
      train: the training stream.
      held_out: the held-out data; it may be empty.
      new_head: whether a classifier's head begins at random, since the checkpoint has none.
    """

    folder: Path
    tokenizer: Any
    table: str
    count: ParameterCount
    train: TrainData
    held_out: EvalData
    new_head: bool


def prepare(
    config: RunConfig,
    *,
    say: Callable[[str], None],
    pinned: RunConfig | None = None,
    on_folder: Callable[[Path], None] = lambda folder: None,
) -> Job:
    """Builds what a run is made of, and refuses what cannot work.

    Args:
      config: the configuration.
      say: told what is worth knowing.
      pinned: the same with the commits of the hub that a resumed run began with.
      on_folder: told of the checkpoint's folder as soon as it is known.

    Raises:
      RefusedError: something that was asked for cannot be done; the message says what.
    """
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise RefusedError(
            "logging.wandb_project is given, but the package wandb is not installed: pip install"
            " wandb, or leave logging.wandb_project empty"
        )
    if config.export.merged and jax.process_count() > 1:
        raise RefusedError(
            "export.merged cannot be asked for where several processes train together, none of "
            "which has the whole model; merge adapter/ afterwards with peft_jax.hub.export_merged"
        )
    try:
        return _prepare(config, say, pinned or config, on_folder)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error


def _prepare(
    config: RunConfig,
    say: Callable[[str], None],
    pinned: RunConfig,
    on_folder: Callable[[Path], None],
) -> Job:
    folder = find_folder(config.model.path, revision=pinned.model.revision or None)
    on_folder(folder)
    model = _build_model(folder, config)
    if config.model.architecture:
        check_architecture(config.model.architecture, model.config)
    new_head = False
    if config.model.weights == "checkpoint":
        model = dataclasses.replace(model, origin=str(folder))
        is_classifier = isinstance(model, SequenceClassifier)
        found = open_sources(folder, model, new_head=is_classifier)
        if absent := sorted(".".join(path) for path in model.hf_names() if path not in found):
            new_head = True
            say(f"the checkpoint has no head for these labels: {', '.join(absent)} begin at random")
    blueprint = draw_blueprint(
        config, model, make_mesh(config.parallel), spec=train_head(config.spec, model)
    )
    _check_memory(blueprint)

    # With the template that is trained with, which goes with the tokenizer into the results.
    tokenizer = load_tokenizer(folder, chat_template=config.data.chat_template)
    _check_vocabulary(tokenizer, model, folder)
    _check_positions(config, model)
    context = model.hf_config.get("max_position_embeddings")
    if context is not None and config.train.max_length > context:
        say(
            f"train.max_length is {config.train.max_length}, and the model was made for texts of "
            f"up to {context} tokens"
        )
    data = pinned.data
    if config.train.epochs is not None:
        # Counting the steps of an epoch takes every row.
        data = dataclasses.replace(data, check_rows=None)
    train, held_out = build_data(
        data,
        tokenizer,
        batch_size=config.train.batch_size,
        max_length=config.train.max_length,
        seed=config.seed,
        labeled=isinstance(model, SequenceClassifier),
        say=say,
    )
    for warning in (*train.warnings, *held_out.warnings):
        say(warning)
    if config.train.epochs is not None:
        steps = train.count_steps(config.train.epochs)
        check_steps(steps, of=f"train.epochs {config.train.epochs:g}")
        blueprint = blueprint.lasting(steps)
    of_blueprint = {
        field.name: getattr(blueprint, field.name) for field in dataclasses.fields(Blueprint)
    }
    return Job(
        **of_blueprint,
        folder=folder,
        tokenizer=tokenizer,
        table=trainable_table(blueprint.spec, blueprint.params, blueprint.adapter),
        count=count_parameters(blueprint.spec, blueprint.params, blueprint.adapter),
        train=train,
        held_out=held_out,
        new_head=new_head,
    )


def _build_model(folder: Path, config: RunConfig) -> Model:
    """The model of a checkpoint; an encoder with the head that the recipe wants."""
    hf_config = read_config(folder)
    if not is_encoder(hf_config):
        return build_model(hf_config, config.execution)
    recipe = get_recipe(config.data.recipe).configured(config.data)
    if not recipe.num_labels:
        raise ValueError(
            f"{folder} is an encoder ({hf_config['model_type']}), which gives labels or numbers,"
            f" and recipe {recipe.name!r} has neither; use one that has, such as GLUE's"
        )
    return build_classifier(hf_config, config.execution, num_labels=recipe.num_labels)


def train_head(spec: AdapterSpec, model: Model) -> AdapterSpec:
    """The specification, with a classifier's head among what is trained itself."""
    if not isinstance(model, SequenceClassifier):
        return spec
    saved = (*spec.modules_to_save, *model.head_modules)
    return dataclasses.replace(spec, modules_to_save=tuple(dict.fromkeys(saved)))


def _check_positions(config: RunConfig, model: Model) -> None:
    """Learned positions end somewhere."""
    if isinstance(model, SequenceClassifier) and config.train.max_length > model.max_tokens:
        raise ValueError(
            f"train.max_length is {config.train.max_length}, and the model has positions for"
            f" {model.max_tokens} tokens"
        )


def _check_vocabulary(tokenizer: Any, model: Model, folder: Path) -> None:
    """Token numbers beyond the embedding's rows would be read as other tokens, silently."""
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, and the model's embedding "
            f"{model.config.vocab_size} rows: they do not belong together"
        )


def _check_memory(blueprint: Blueprint) -> None:
    """Rejects a run whose arrays, or whose microbatches, cannot fit in memory."""
    check_fits(
        {
            "the frozen base": blueprint.frozen,
            "what is trained": {"trained": blueprint.adapter},
            "the optimizer's state": {"state": blueprint.state.opt_state},
        },
        "choose model.dtype bfloat16, model.quantization int8 or nf4, a smaller method.rank, or"
        " shard over more devices",
    )
    train, width = blueprint.config.train, blueprint.model.execution.dtype.itemsize
    # The least a microbatch takes: one block's input, and its gradient.
    features = blueprint.model.config.hidden_size
    least = 2 * blueprint.rows_on_a_device * train.max_length * features * width
    memory = device_memory()
    if memory is not None and least > memory:
        raise ValueError(
            f"train.batch_size {train.batch_size} in train.gradient_accumulation "
            f"{train.gradient_accumulation} microbatches of train.max_length {train.max_length} "
            f"tokens: one block's activations alone take {gib(least)} on a device, which has "
            f"{gib(memory)}"
        )
