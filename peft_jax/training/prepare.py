"""Builds and checks everything a run needs, before any weight is loaded."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from peft_jax.adapters import (
    AdapterSpec,
    ParameterCount,
    VirtualMethod,
    count_parameters,
    trainable_table,
)
from peft_jax.cost.memory import check_fits, device_memory, gib
from peft_jax.data import EvalData, TrainData, build_data, get_recipe
from peft_jax.hub import find_folder, read_config
from peft_jax.hub.load import open_sources
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import (
    CausalLM,
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
from peft_jax.training.config import RunConfig
from peft_jax.training.config_sections import check_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Blueprint):
    """Program, tokenizer and data of a run; it holds no large arrays.

    Attributes:
      folder: Checkpoint folder of the base model.
      tokenizer: Transformers tokenizer.
      table: Table of trainable parameters, to print.
      count: Numbers of trainable and of all parameters.
      train: Training stream.
      held_out: Held-out data; may be empty.
      new_head: Whether a classifier's head is initialized, because the checkpoint has none.
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
    """Builds the job of a run, and rejects invalid configurations.

    Args:
      config: Configuration of the run.
      say: Prints warnings.
      pinned: Configuration with the Hub commits that a resumed run began with.
      on_folder: Called with the checkpoint folder as soon as it is known.

    Raises:
      RefusedError: The configuration is invalid; the message says why.
    """
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise RefusedError(
            f"logging.wandb_project is {config.logging.wandb_project!r}, but the package wandb is"
            " not installed: pip install wandb, or leave logging.wandb_project empty"
        )
    if config.export.merged and jax.process_count() > 1:
        raise RefusedError(
            "export.merged must be off in a multi-process run, because no process has the full "
            "model; merge adapter/ afterwards with peft_jax.hub.export_merged"
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
    _check_correction(config)
    folder = find_folder(config.model.path, revision=pinned.model.revision or None)
    on_folder(folder)
    model = build_base(folder, config)
    if config.model.architecture:
        check_architecture(config.model.architecture, model.config)
    new_head = False
    if config.model.weights == "checkpoint":
        model = dataclasses.replace(model, origin=str(folder))
        is_classifier = isinstance(model, SequenceClassifier)
        found = open_sources(folder, model, new_head=is_classifier)
        if absent := sorted(".".join(path) for path in model.hf_names() if path not in found):
            new_head = True
            say(f"the checkpoint has no head for these labels; initialized {', '.join(absent)}")
    blueprint = draw_blueprint(
        config, model, make_mesh(config.parallel), spec=train_head(config.spec, model)
    )
    _check_memory(blueprint)

    # The chat template of training becomes part of the exported tokenizer.
    tokenizer = load_tokenizer(folder, chat_template=config.data.chat_template)
    _check_vocabulary(tokenizer, model, folder)
    _check_positions(config, model)
    context = getattr(model.config, "max_positions", None)
    if context is not None and config.train.max_length > context:
        say(
            f"train.max_length is {config.train.max_length}, but the model was trained with texts "
            f"of up to {context} tokens"
        )
    data = pinned.data
    if config.train.epochs is not None:
        # Counting the steps of an epoch needs every row.
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


def build_base(folder: Path, config: RunConfig) -> Model:
    """Builds the model of a checkpoint; an encoder with the head that the recipe needs."""
    hf_config = read_config(folder)
    if not is_encoder(hf_config):
        return build_model(hf_config, config.execution)
    recipe = get_recipe(config.data.recipe).configured(config.data)
    if not recipe.num_labels:
        raise ValueError(
            f"data.recipe is {recipe.name!r}, but {folder} is an encoder"
            f" ({hf_config['model_type']}) and needs a recipe with labels, such as GLUE's"
        )
    return build_classifier(hf_config, config.execution, num_labels=recipe.num_labels)


def train_head(spec: AdapterSpec, model: Model) -> AdapterSpec:
    """Returns the specification with a classifier's head in `modules_to_save`."""
    if not isinstance(model, SequenceClassifier):
        return spec
    saved = (*spec.modules_to_save, *model.head_modules)
    return dataclasses.replace(spec, modules_to_save=tuple(dict.fromkeys(saved)))


def _check_positions(config: RunConfig, model: Model) -> None:
    """Rejects rows longer than the model's learned positions, if it has any."""
    if isinstance(config.spec.method, VirtualMethod) and isinstance(model, CausalLM):
        count = config.spec.method.num_virtual_tokens
        model.check_virtual_rows(
            count, config.train.max_length, of_one_segment=not config.data.packing
        )
    limit = getattr(model.config, "max_tokens", None)
    if limit is not None and config.train.max_length > limit:
        raise ValueError(
            f"train.max_length is {config.train.max_length}, but the model only has positions for"
            f" {limit} tokens"
        )


def _check_vocabulary(tokenizer: Any, model: Model, folder: Path) -> None:
    """Rejects a tokenizer with more tokens than the embedding, which would be misread silently."""
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, but the model's embedding has "
            f"{model.config.vocab_size} rows; use the model's own tokenizer"
        )


def _check_correction(config: RunConfig) -> None:
    """Rejects a method that corrects quantization if there is none, or no checkpoint."""
    if not config.spec.method.corrects_quantization:
        return
    method, model = config.spec.method.name, config.model
    if model.quantization == "none":
        raise RefusedError(
            f"model.quantization is 'none', but {method} corrects the errors of quantized kernels;"
            " set it to nf4 or int8, or use lora"
        )
    if model.weights == "random":
        raise RefusedError(
            f"model.weights is 'random', but {method} needs the kernels of a checkpoint; use lora"
        )


def _check_memory(blueprint: Blueprint) -> None:
    """Rejects a run whose arrays, or whose microbatches, cannot fit in memory."""
    check_fits(
        {
            "frozen parameters": blueprint.frozen,
            "trainable parameters": {"trained": blueprint.adapter},
            "optimizer state": {"state": blueprint.state.opt_state},
        },
        "choose model.dtype bfloat16, model.quantization int8 or nf4, a smaller method.rank, or"
        " shard over more devices",
    )
    train, width = blueprint.config.train, blueprint.model.execution.dtype.itemsize
    # A microbatch needs at least one block's input and its gradient.
    features = blueprint.model.config.hidden_size
    least = 2 * blueprint.rows_on_a_device * train.max_length * features * width
    memory = device_memory()
    if memory is not None and least > memory:
        raise ValueError(
            f"one block's activations take {gib(least)} on a device, but a device has"
            f" {gib(memory)}: lower train.batch_size ({train.batch_size}) or train.max_length"
            f" ({train.max_length}), or raise train.gradient_accumulation"
            f" ({train.gradient_accumulation})"
        )
