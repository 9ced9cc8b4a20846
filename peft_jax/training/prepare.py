"""Everything a run needs, built and checked before any weight is loaded."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.adapters import (
    AdapterSpec,
    AdapterState,
    Hybrid,
    ParameterCount,
    count_parameters,
    trainable_table,
)
from peft_jax.core import Tree, flatten, unflatten
from peft_jax.data import EvalData, TrainData, build_data
from peft_jax.hub import find_folder, read_config
from peft_jax.hub.load import open_sources
from peft_jax.models import CausalLM, build_model
from peft_jax.optim import learning_rate_schedule, make_optimizer
from peft_jax.parallel import LogicalAxisRules, batch_sharding, make_mesh, sharding_tree
from peft_jax.training.config import RunConfig
from peft_jax.training.errors import RefusedError
from peft_jax.training.metrics import require_wandb
from peft_jax.training.placement import RowPlacement
from peft_jax.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a run is made of; nothing in it is large.

    Attributes:
      config: the configuration.
      folder: the checkpoint's folder.
      model: the model.
      tokenizer: its transformers tokenizer.
      spec: what is adapted.
      params: the model's parameters as shapes with shardings.
      constant: the adapter's constant arrays as shapes with shardings.
      state: what a step changes, as shapes with shardings.
      table: what is trained, to print.
      count: how many numbers are trained, and how many there are.
      train: the training stream.
      held_out: the held-out data; it may be empty.
      optimizer: turns gradients into updates.
      learning_rate: the schedule.
      mesh: the devices.
      placement: where rows of a batch go.
    """

    config: RunConfig
    folder: Path
    model: CausalLM
    tokenizer: Any
    spec: AdapterSpec
    params: Tree
    constant: Tree
    state: TrainState
    table: str
    count: ParameterCount
    train: TrainData
    held_out: EvalData
    optimizer: optax.GradientTransformationExtraArgs
    learning_rate: Callable[[Any], Any]
    mesh: jax.sharding.Mesh
    placement: RowPlacement


def prepare(config: RunConfig, *, say: Callable[[str], None]) -> Job:
    """Builds what a run is made of, and refuses what cannot work.

    Args:
      config: the configuration.
      say: told what is worth knowing.

    Raises:
      RefusedError: something that was asked for cannot be done; the message says what.
    """
    if config.logging.wandb_project:
        require_wandb()
    if config.export.merged and jax.process_count() > 1:
        raise RefusedError(
            "export.merged cannot be asked for where several processes train together, none of "
            "which has the whole model; merge adapter/ afterwards with peft_jax.hub.export_merged"
        )
    try:
        return _prepare(config, say)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error


def _prepare(config: RunConfig, say: Callable[[str], None]) -> Job:
    folder = find_folder(config.model.path, revision=config.model.revision or None)
    model = build_model(read_config(folder), config.execution)
    if config.model.weights == "checkpoint":
        open_sources(folder, model)
    spec = config.method.spec
    quantization = config.model.quantization
    params = model.abstract_params(config.model.dtype, quantization)
    adapter = spec.abstract(params)
    optimizer = _make_optimizer(config)
    state = abstract_state(adapter.trainable, optimizer)

    mesh = make_mesh(config.parallel)
    rules = LogicalAxisRules()
    placement = _place_rows(mesh, rules)
    _check_rows(config, model, placement)
    adapter_axes = spec.axes(params, model.logical_axes())
    params = _with_shardings(params, model.logical_axes(quantization), mesh, rules)
    adapter = AdapterState(
        trainable=_with_shardings(adapter.trainable, adapter_axes.trainable, mesh, rules),
        constant=_with_shardings(adapter.constant, adapter_axes.constant, mesh, rules),
    )
    state = _shard_state(state, adapter.trainable, optimizer, mesh)

    tokenizer = load_tokenizer(folder)
    _check_vocabulary(tokenizer, model, folder)
    context = model.hf_config.get("max_position_embeddings")
    if context is not None and config.train.max_length > context:
        say(
            f"train.max_length is {config.train.max_length}, and the model was made for texts of "
            f"up to {context} tokens"
        )
    train, held_out = build_data(
        config.data,
        tokenizer,
        batch_size=config.train.batch_size,
        max_length=config.train.max_length,
        seed=config.seed,
    )
    return Job(
        config=config,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        params=params,
        constant=adapter.constant,
        state=state,
        table=trainable_table(spec, params, adapter),
        count=count_parameters(spec, params, adapter),
        train=train,
        held_out=held_out,
        optimizer=optimizer,
        learning_rate=learning_rate_schedule(config.optimizer, config.train.steps),
        mesh=mesh,
        placement=placement,
    )


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer; none of its code is ever run.

    Raises:
      ValueError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # transformers raises whatever its many tokenizers raise.
        raise ValueError(f"{folder} has no tokenizer that can be loaded: {error}") from error


def _make_optimizer(config: RunConfig) -> optax.GradientTransformationExtraArgs:
    mixing = config.mixing if isinstance(config.method.method, Hybrid) else None
    return make_optimizer(config.optimizer, config.train.steps, mixing=mixing)


def _check_vocabulary(tokenizer: Any, model: CausalLM, folder: Path) -> None:
    """Token numbers beyond the embedding's rows would be read as other tokens, silently."""
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, and the model's embedding "
            f"{model.config.vocab_size} rows: they do not belong together"
        )


def _place_rows(mesh: jax.sharding.Mesh, rules: LogicalAxisRules) -> RowPlacement:
    rows = batch_sharding(mesh, rules)
    return RowPlacement(rows=rows, microbatches=jax.NamedSharding(mesh, jax.P(None, *rows.spec)))


def _check_rows(config: RunConfig, model: CausalLM, placement: RowPlacement) -> None:
    """Refuses batches that cannot be cut evenly, or that no memory holds."""
    train = config.train
    parts = _parts(placement.rows)
    if train.microbatch_size % parts:
        raise ValueError(
            f"train.batch_size {train.batch_size} in {train.gradient_accumulation} microbatches "
            f"makes {train.microbatch_size} rows at a time, which {parts} devices cannot share "
            f"equally; the batch size must be a multiple of {parts * train.gradient_accumulation}"
        )
    rows = train.microbatch_size // parts
    width = jnp.dtype(config.execution.compute_dtype).itemsize
    # The least a microbatch takes: one block's input, and its gradient.
    least = 2 * rows * train.max_length * model.config.hidden_size * width
    memory = device_memory()
    if memory is not None and least > memory:
        raise ValueError(
            f"train.batch_size {train.batch_size} in train.gradient_accumulation "
            f"{train.gradient_accumulation} microbatches of train.max_length {train.max_length} "
            f"tokens: one block's activations alone take {_gib(least)} on a device, which has "
            f"{_gib(memory)}"
        )


def device_memory() -> int | None:
    """The bytes of memory of one device; the host's for a CPU, None where it is not known."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _parts(sharding: jax.sharding.NamedSharding) -> int:
    """Into how many parts the leading axis is cut.

    Example:
      >>> from peft_jax.parallel import MeshSettings
      >>> mesh = make_mesh(MeshSettings(devices=1))
      >>> _parts(jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
      1
    """
    axes = sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    return math.prod(sharding.mesh.shape[name] for name in names)


def _with_shardings(
    shapes: Tree, axes: Tree, mesh: jax.sharding.Mesh, rules: LogicalAxisRules
) -> Tree:
    """Shapes with the shardings that the rules make of their axes; empty branches are left out."""
    shapes, axes = unflatten(flatten(shapes)), unflatten(flatten(axes))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        sharding_tree(axes, mesh, rules, shapes),
    )


def _shard_state(
    state: TrainState,
    trainable: Tree,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """The state's shapes with shardings: the optimiser's are those of what they belong to."""
    everywhere = jax.NamedSharding(mesh, jax.P())

    def whole(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    def as_its_own(leaf: Any, of: Any) -> Any:
        # A factored second moment has other axes than what it belongs to.
        if leaf.shape != of.shape:
            return whole(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of.sharding)

    opt_state = optax.tree_map_params(
        optimizer,
        as_its_own,
        state.opt_state,
        trainable,
        # What belongs to no parameter may be a tree of its own, as the mixing's weights are.
        transform_non_params=lambda node: jax.tree.map(whole, node),
    )
    return TrainState(step=whole(state.step), trainable=trainable, opt_state=opt_state)
