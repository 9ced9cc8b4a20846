"""Loading a Hugging Face checkpoint straight into stacked, sharded arrays.

Tensors are read a piece at a time into the arrays of the wanted dtype, or quantized on the way, so
the host never holds more than its share of the model and one tensor. Of a tensor only the part is
read that this process's devices hold.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import Path, Tree, did_you_mean, flatten, is_stacked, unflatten
from peft_jax.cost.memory import check_fits
from peft_jax.hub.checkpoint import Checkpoint, open_checkpoint, read_config
from peft_jax.hub.converted import is_converted, open_converted, warn_of_dtype
from peft_jax.hub.fetch import find_folder
from peft_jax.hub.leaf_loading import place
from peft_jax.hub.leaf_sources import LeafSource, StoredLeaf
from peft_jax.hub.tensors import StoredTensor
from peft_jax.models import (
    CausalLM,
    ExecutionSettings,
    Model,
    SequenceClassifier,
    build_classifier,
    build_model,
)

Shardings = Tree | jax.sharding.Sharding | Callable[[Model], Tree]
"""A tree of shardings as the parameters', one for all, or what makes the tree for a model."""

_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that only repeat what config.json says."""

_HEAD = "lm_head.weight"
_NAMED_AT_MOST = 8


def load_model(
    path: str | FilePath,
    *,
    dtype: Any = jnp.float32,
    execution: ExecutionSettings | None = None,
    quantization: str = "none",
    sharding: Shardings | None = None,
    revision: str | None = None,
) -> tuple[CausalLM, Tree]:
    """A model and its parameters from a folder, or from the Hugging Face hub.

    Args:
      path: a folder with `config.json` and safetensors, a name on the hub, or the place of a
        converted checkpoint (`python -m peft_jax.convert`).
      dtype: of the parameters, whatever the files have.
      execution: how the model is computed.
      quantization: "none", or what the blocks' kernels are held as, "int8" or "nf4"; see
        `CausalLM.abstract_params`.
      sharding: how the parameters are laid out over devices; by default on the first.
      revision: a branch, tag or commit on the hub.

    Returns:
      The model, and its parameters as nested dictionaries of arrays.

    Raises:
      ValueError: the checkpoint is not one this library understands wholly: the attribute of
        `config.json`, or the tensors missing, left over or of the wrong shape, are named.
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
    """An encoder with a classification or regression head; see `load_model` for what is not here.

    Args:
      path: a folder with `config.json` and safetensors, or a name on the hub.
      num_labels: how many labels the head has, 1 for a regression; by default as many as
        `config.json` says.
      head_key: a random key for the head where the checkpoint has none of that size; an adapter
        that was trained with a head of its own replaces it.
      dtype: of the parameters.
      execution: how the model is computed.
      sharding: how the parameters are laid out over devices.
      revision: a branch, tag or commit on the hub.

    Raises:
      ValueError: as `load_model`, or the checkpoint has no such head and `head_key` is not given.
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
    """The parameters of `model` from a checkpoint's folder.

    Arguments as for `load_model` and `load_classifier`.
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
        warn_of_dtype(folder, jnp.dtype(dtype))
    sources = open_sources(folder, model, new_head=head_key is not None)
    drawn: dict[Path, jax.Array] = {}
    if head_key is not None:
        drawn = model.init_leaves(head_key, [p for p in shapes if p not in sources], dtype)
    return unflatten(
        {
            path: jax.device_put(drawn[path], shardings[path])
            if path in drawn
            else place(leaf, shardings[path], sources[path])
            for path, leaf in shapes.items()
        }
    )


def _check_memory(shapes: dict[Path, Any], shardings: dict[Path, Any], dtype: Any) -> None:
    """Rejects parameters that do not fit in memory.

    Raises:
      ValueError: they do not.
    """
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
        "load them in bfloat16 or quantized (int8, nf4), shard them over more devices, or take a"
        " smaller model",
    )


def open_sources(
    folder: FilePath, model: Model, *, new_head: bool = False
) -> dict[Path, LeafSource]:
    """Where the numbers of every leaf are read from; nothing but headers has been read.

    Args:
      folder: the checkpoint's.
      model: what is wanted.
      new_head: as for `match_tensors`.

    Raises:
      ValueError: as `match_tensors`, or as `open_converted`.
    """
    if is_converted(folder):
        return open_converted(folder, model)
    names = model.hf_names()
    return {
        path: StoredLeaf(tensors, stacked=is_stacked(path), transposed=names[path].transposed)
        for path, tensors in match_tensors(
            open_checkpoint(folder), model, new_head=new_head
        ).items()
    }


def match_tensors(
    checkpoint: Checkpoint, model: Model, *, new_head: bool = False
) -> dict[Path, list[StoredTensor]]:
    """The stored tensor, or one a layer, of every leaf.

    Args:
      checkpoint: what is stored.
      model: what is wanted.
      new_head: leave out a classifier's head, and pooler, that the checkpoint does not have.

    Raises:
      ValueError: tensors are missing, left over, or of the wrong shape; they are named.
    """
    tensors = _used_tensors(checkpoint, model)
    prefix = model.family.naming.prefix + "."
    # Checkpoints of the bare decoder leave the prefix out, as BLOOM's do.
    bare = not any(name.startswith(prefix) for name in tensors)
    wanted = _wanted_names(model, bare=bare)
    if model.config.tie_word_embeddings:
        _settle_tied_head(tensors, _embedding_name(wanted))
    for path in _absent_head(wanted, tensors, model):
        if not new_head:
            raise ValueError(
                f"{checkpoint.folder} has no trained head for {model.hf_names()[path].name()}: give"
                " head_key, a random key, to begin with a new one"
            )
        for name in wanted.pop(path):
            tensors.pop(name, None)
    missing = [name for names in wanted.values() for name in names if name not in tensors]
    used = {name for names in wanted.values() for name in names}
    extra = [name for name in tensors if name not in used and not _DERIVED.fullmatch(name)]
    if missing or extra:
        raise ValueError(_unmatched(checkpoint.folder, missing, extra))
    sources = {path: [tensors[name] for name in names] for path, names in wanted.items()}
    _check_shapes(sources, model)
    return sources


def _wanted_names(model: Model, *, bare: bool) -> dict[Path, list[str]]:
    """The names of every leaf's tensors, one a layer where the leaf is stacked."""
    wanted = {}
    for path, tensor in model.hf_names().items():
        layers = range(model.config.num_layers) if is_stacked(path) else (None,)
        names = [tensor.name(layer) for layer in layers]
        if bare:
            names = [name.removeprefix(model.family.naming.prefix + ".") for name in names]
        wanted[path] = names
    return wanted


def _embedding_name(wanted: dict[Path, list[str]]) -> str:
    (name,) = (names[0] for path, names in wanted.items() if path[-1] == "embedding")
    return name


def _settle_tied_head(tensors: dict[str, StoredTensor], embedding: str) -> None:
    """Drops the head of a tied model, which may also stand for the embedding.

    Raises:
      ValueError: both are there and they differ.
    """
    head = tensors.pop(_HEAD, None)
    if head is None:
        return
    stored = tensors.setdefault(embedding, head)
    if stored is head:
        return
    if stored.shape != head.shape or not _equal(stored, head):
        raise ValueError(
            f"config.json ties the head to the embedding, but {_HEAD} and {embedding} differ; if"
            " the head is meant, set tie_word_embeddings to false in config.json"
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    pieces = zip(one.pieces(), other.pieces(), strict=True)
    return one.dtype == other.dtype and all(np.array_equal(a, b) for (_, a), (_, b) in pieces)


def _check_shapes(sources: dict[Path, list[StoredTensor]], model: Model) -> None:
    shapes = _stored_shapes(model)
    wrong = [
        f"{tensor.name} is {list(tensor.shape)}, and config.json makes it {list(shapes[path])}"
        for path, tensors in sources.items()
        for tensor in tensors
        if tensor.shape != shapes[path]
    ]
    if wrong:
        raise ValueError(f"tensors of the wrong shape: {_listing(wrong)}")


def _stored_shapes(model: Model) -> dict[Path, tuple[int, ...]]:
    """The shape of every leaf's tensors, of one layer where it is stacked."""
    names = model.hf_names()
    shapes = {
        path: leaf.shape[1:] if is_stacked(path) else leaf.shape
        for path, leaf in flatten(model.abstract_params()).items()
    }
    return {p: shape[::-1] if names[p].transposed else shape for p, shape in shapes.items()}


def _used_tensors(checkpoint: Checkpoint, model: Model) -> dict[str, StoredTensor]:
    """The checkpoint's tensors by the names they have now, without those the model leaves."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in model.family.unused):
            continue
        for old, new in model.family.old_names:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        found[name] = tensor
    return found


def _absent_head(
    wanted: dict[Path, list[str]], tensors: dict[str, StoredTensor], model: Model
) -> list[Path]:
    """The leaves of a classifier's head that are not stored, or in another size."""
    if not isinstance(model, SequenceClassifier):
        return []
    shapes = _stored_shapes(model)
    return [
        path
        for path in sorted(model.head_leaves)
        if any(name not in tensors or tensors[name].shape != shapes[path] for name in wanted[path])
    ]


def _unmatched(folder: FilePath, missing: list[str], extra: list[str]) -> str:
    parts = []
    if missing:
        hint = ""
        if missing == [_HEAD]:
            hint = " (config.json does not tie the head to the embedding)"
        elif extra:
            hint = did_you_mean(missing[0], extra) if len(extra) <= _NAMED_AT_MOST else ""
        parts.append(f"it lacks {_listing(missing)}{hint}")
    if extra:
        parts.append(f"it has {_listing(extra)}, which the model does not use")
    return f"the tensors of {folder} do not fit its config.json: {'; '.join(parts)}"


def _listing(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
