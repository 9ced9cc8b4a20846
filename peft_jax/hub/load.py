"""Loads Hugging Face checkpoints directly into stacked, sharded arrays.

Tensors are read in pieces and converted or quantized on the way, so the host holds at most its
shards of the model and one tensor. Only the range of a tensor that this process's devices hold is
read.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import Path, Tree, did_you_mean, flatten, is_experts, is_stacked, unflatten
from peft_jax.cost.memory import check_fits
from peft_jax.hub.adapter_arrays import MAX_LISTED, listing
from peft_jax.hub.checkpoint import Checkpoint, open_checkpoint, read_config
from peft_jax.hub.converted import is_converted, open_converted, warn_on_dtype
from peft_jax.hub.fetch import find_folder
from peft_jax.hub.leaf_loading import load_leaf
from peft_jax.hub.leaf_sources import LeafSource, StoredExperts, StoredLeaf
from peft_jax.hub.mxfp4 import BLOCKS, PackedExperts, packed_names, packed_shape
from peft_jax.hub.tensors import StoredTensor
from peft_jax.hub.unpacking import unpack_tensors
from peft_jax.models import (
    CausalLM,
    ExecutionSettings,
    HFTensor,
    Model,
    SequenceClassifier,
    build_classifier,
    build_model,
)
from peft_jax.models.packed_kernels import is_packed

Shardings = Tree | jax.sharding.Sharding | Callable[[Model], Tree]
"""A tree of shardings, one sharding for all leaves, or a function from a model to the tree."""

_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that are derived from config.json."""

_HEAD = "lm_head.weight"

_log = logging.getLogger(__name__)


def load_model(
    path: str | FilePath,
    *,
    dtype: Any = jnp.float32,
    execution: ExecutionSettings | None = None,
    quantization: str = "none",
    sharding: Shardings | None = None,
    revision: str | None = None,
) -> tuple[CausalLM, Tree]:
    """Loads a causal language model from a folder or from the Hugging Face hub.

    Args:
      path: Folder with `config.json` and safetensors, name on the hub, or location of a converted
        checkpoint (`python -m peft_jax.convert`).
      dtype: Parameter dtype.
      execution: Execution settings; None for the defaults.
      quantization: Format of the blocks' kernels, one of `peft_jax.core.FORMATS`; see
        `CausalLM.abstract_params`.
      sharding: Sharding of the parameters; by default, all on the first device.
      revision: Branch, tag or commit on the hub.

    Returns:
      The model, and its parameters as nested dictionaries of arrays.

    Raises:
      ValueError: The checkpoint is not supported or damaged; the message names the attribute of
        `config.json`, or the missing, unexpected or wrongly shaped tensors.
    """
    folder = find_folder(path, revision=revision)
    model = build_model(read_config(folder), execution)
    model = dataclasses.replace(model, origin=str(folder))
    return model, load_params(
        folder, model, dtype=dtype, quantization=quantization, sharding=sharding
    )


def load_classifier(
    path: str | FilePath,
    *,
    num_labels: int | None = None,
    head_key: jax.Array | None = None,
    dtype: Any = jnp.float32,
    execution: ExecutionSettings | None = None,
    sharding: Shardings | None = None,
    revision: str | None = None,
) -> tuple[SequenceClassifier, Tree]:
    """Loads an encoder with a classification or regression head.

    Args:
      path: Folder with `config.json` and safetensors, or name on the hub.
      num_labels: Number of labels of the head, 1 for regression; None for the number in
        `config.json`.
      head_key: Random key to initialize the head if the checkpoint has none of that size. An
        adapter that was trained with its own head replaces it.
      dtype: Parameter dtype.
      execution: Execution settings; None for the defaults.
      sharding: Sharding of the parameters; by default, all on the first device.
      revision: Branch, tag or commit on the hub.

    Returns:
      The model, and its parameters as nested dictionaries of arrays.

    Raises:
      ValueError: See `load_model`; or the checkpoint has no such head and `head_key` is None.
    """
    folder = find_folder(path, revision=revision)
    model = build_classifier(read_config(folder), execution, num_labels=num_labels)
    model = dataclasses.replace(model, origin=str(folder))
    return model, load_params(folder, model, dtype=dtype, sharding=sharding, head_key=head_key)


def load_params(
    folder: FilePath,
    model: Model,
    *,
    dtype: Any = jnp.float32,
    quantization: str = "none",
    sharding: Shardings | None = None,
    head_key: jax.Array | None = None,
) -> Tree:
    """Loads the parameters of `model` from a checkpoint's folder.

    See `load_model` and `load_classifier` for the arguments.
    """
    if callable(sharding):
        sharding = sharding(model)
    shapes = flatten(model.abstract_params(dtype, quantization))
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        whole = sharding
        shardings = {path: jax.tree.map(lambda _: whole, leaf) for path, leaf in shapes.items()}
    else:
        shardings = flatten(sharding)
    _check_memory(shapes, shardings, dtype)
    if is_converted(folder):
        warn_on_dtype(folder, jnp.dtype(dtype))
    sources = open_sources(folder, model, new_head=head_key is not None)
    packing = model.hf_config.get("quantization_config")
    if quantization == "none" and packing is not None and is_packed(packing):
        _log.warning(
            f"the kernels of {folder} are packed ({packing['quant_method']}) and are unpacked to"
            f" {jnp.dtype(dtype)}; quantization='nf4' or 'int8' packs them again"
        )
    drawn: dict[Path, jax.Array] = {}
    if head_key is not None:
        drawn = model.init_leaves(head_key, [p for p in shapes if p not in sources], dtype)
    return unflatten(
        {
            path: jax.device_put(drawn[path], shardings[path])
            if path in drawn
            else load_leaf(leaf, shardings[path], sources[path])
            for path, leaf in shapes.items()
        }
    )


def _check_memory(shapes: dict[Path, Any], shardings: dict[Path, Any], dtype: Any) -> None:
    """Raises ValueError if the parameters do not fit in memory."""
    laid_out = {
        path: jax.tree.map(
            lambda part, layout: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=layout),
            leaf,
            shardings[path],
        )
        for path, leaf in shapes.items()
    }
    check_fits(
        {f"the parameters in {jnp.dtype(dtype)}": laid_out},
        "load them in bfloat16 or quantized (int8, nf4), shard them over more devices, or use a"
        " smaller model",
    )


def open_sources(
    folder: FilePath, model: Model, *, new_head: bool = False
) -> dict[Path, LeafSource]:
    """Returns the source of every leaf; only headers are read.

    Args:
      folder: Folder of the checkpoint.
      model: Model to load.
      new_head: See `match_tensors`.

    Raises:
      ValueError: See `match_tensors` and `open_converted`.
    """
    if is_converted(folder):
        return open_converted(folder, model)
    names = model.hf_names()
    found = match_tensors(open_checkpoint(folder), model, new_head=new_head)
    return {path: _source(names[path], path, tensors, model) for path, tensors in found.items()}


def _source(name: HFTensor, path: Path, tensors: list[StoredTensor], model: Model) -> LeafSource:
    if tensors[0].name.endswith(BLOCKS):
        return PackedExperts(tensors)
    if is_experts(path) and name.stored:
        experts = flatten(model.abstract_params())[path].shape[1]
        return StoredExperts(tensors, experts=experts, joined=len(name.stored))
    return StoredLeaf(
        tensors, stacked=is_stacked(path), transposed=name.transposed, first=name.first
    )


def match_tensors(
    checkpoint: Checkpoint, model: Model, *, new_head: bool = False
) -> dict[Path, list[StoredTensor]]:
    """Returns the stored tensors of every leaf, in the order of `HFTensor.stored_names`.

    Args:
      checkpoint: Open checkpoint.
      model: Model to load.
      new_head: Whether to omit a classifier's head and pooler that the checkpoint lacks.

    Raises:
      ValueError: Tensors are missing, unexpected or wrongly shaped; the message names them.
    """
    tensors = _used_tensors(checkpoint, model)
    prefix = model.family.naming.prefix + "."
    # Checkpoints of the bare decoder, such as BLOOM's, omit the prefix.
    bare = not any(name.startswith(prefix) for name in tensors)
    wanted = _wanted_names(model, tensors, bare=bare)
    if model.config.tie_word_embeddings:
        _drop_tied_head(tensors, _embedding_name(wanted))
    for path in _absent_head(wanted, tensors, model):
        if not new_head:
            raise ValueError(
                f"{checkpoint.folder} has no trained head ({model.hf_names()[path].name()}); pass"
                " head_key, a random key, to initialize a new one"
            )
        for name in wanted.pop(path):
            tensors.pop(name, None)
    missing = [name for names in wanted.values() for name in names if name not in tensors]
    used = {name for names in wanted.values() for name in names}
    extra = [name for name in tensors if name not in used and not _DERIVED.fullmatch(name)]
    if missing or extra:
        raise ValueError(_mismatch_message(checkpoint.folder, missing, extra))
    sources = {path: [tensors[name] for name in names] for path, names in wanted.items()}
    _check_shapes(sources, model)
    return sources


def _wanted_names(model: Model, stored: Collection[str], *, bare: bool) -> dict[Path, list[str]]:
    """Returns the names of every leaf's tensors, in the order of `HFTensor.stored_names`.

    Args:
      model: Model to load.
      stored: Names of the tensors in the checkpoint. Kernels of experts may be packed in it.
      bare: Whether they lack the prefix.
    """
    wanted = {}
    shapes = {path: leaf.shape for path, leaf in flatten(model.abstract_params()).items()}
    for path, tensor in model.hf_names().items():
        names = [name for _, name in tensor.stored_names(shapes[path])]
        if bare:
            names = [name.removeprefix(model.family.naming.prefix + ".") for name in names]
        if is_experts(path):
            names = [one for name in names for one in packed_names(name, stored)]
        wanted[path] = names
    return wanted


def _embedding_name(wanted: dict[Path, list[str]]) -> str:
    (name,) = (names[0] for path, names in wanted.items() if path[-1] == "embedding")
    return name


def _drop_tied_head(tensors: dict[str, StoredTensor], embedding: str) -> None:
    """Drops the head of a tied model, or uses it as the embedding if that is missing.

    Raises:
      ValueError: Both exist and differ.
    """
    head = tensors.pop(_HEAD, None)
    if head is None:
        return
    stored = tensors.setdefault(embedding, head)
    if stored is head:
        return
    if stored.shape != head.shape or not _equal(stored, head):
        raise ValueError(
            f"config.json sets tie_word_embeddings to true, but {_HEAD} and {embedding} differ; to"
            " use the head, set tie_word_embeddings to false"
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    pieces = zip(one.pieces(), other.pieces(), strict=True)
    return one.dtype == other.dtype and all(np.array_equal(a, b) for (_, a), (_, b) in pieces)


def _check_shapes(sources: dict[Path, list[StoredTensor]], model: Model) -> None:
    shapes = _stored_shapes(model)

    def required(path: Path, tensor: StoredTensor) -> tuple[int, ...]:
        shape = shapes[path]
        return packed_shape(tensor.name, shape) if is_experts(path) else shape

    wrong = [
        f"{tensor.name} has {list(tensor.shape)}, but config.json requires"
        f" {list(required(path, tensor))}"
        for path, tensors in sources.items()
        for tensor in tensors
        if tensor.shape != required(path, tensor)
    ]
    if wrong:
        raise ValueError(f"tensors of the wrong shape: {listing(wrong)}")


def _stored_shapes(model: Model) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every leaf's tensors."""
    names = model.hf_names()
    leaves = flatten(model.abstract_params())
    return {path: names[path].stored_shape(leaf.shape) for path, leaf in leaves.items()}


def _used_tensors(checkpoint: Checkpoint, model: Model) -> dict[str, StoredTensor]:
    """Returns the checkpoint's tensors by current names, without those the model ignores."""
    found = {}
    tensors = unpack_tensors(checkpoint.tensors, model.hf_config.get("quantization_config"))
    layers = str(model.num_layers)
    unused = [pattern.replace("{layers}", layers) for pattern in model.family.unused]
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in unused):
            continue
        for old, new in model.family.old_names:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        for old, new in model.family.old_prefixes:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        found[name] = tensor
    return found


def _absent_head(
    wanted: dict[Path, list[str]], tensors: dict[str, StoredTensor], model: Model
) -> list[Path]:
    """Returns the leaves of a classifier's head that are not stored, or in another shape."""
    if not isinstance(model, SequenceClassifier):
        return []
    shapes = _stored_shapes(model)
    return [
        path
        for path in sorted(model.head_leaves)
        if any(name not in tensors or tensors[name].shape != shapes[path] for name in wanted[path])
    ]


def _mismatch_message(folder: FilePath, missing: list[str], extra: list[str]) -> str:
    parts = []
    if missing:
        hint = ""
        if missing == [_HEAD]:
            hint = " (tie_word_embeddings is false in config.json)"
        elif extra:
            hint = did_you_mean(missing[0], extra) if len(extra) <= MAX_LISTED else ""
        parts.append(f"it lacks {listing(missing)}{hint}")
    if extra:
        parts.append(f"it has {listing(extra)}, which the model does not use")
    return f"the tensors of {folder} do not fit its config.json: {'; '.join(parts)}"
