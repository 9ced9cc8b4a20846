"""Saves a model as a Hugging Face checkpoint, which transformers and others load.

Tensors are fetched and written one at a time, so the host holds only one copy of one tensor.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import AdaptedKernel, Path, Tree, flatten, join_path
from peft_jax.hub.checkpoint import CONFIG, INDEX, WEIGHTS
from peft_jax.hub.tensors import TensorToWrite, write_tensors
from peft_jax.models import Model
from peft_jax.models.naming import Index
from peft_jax.runtime.files import write_json

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

MAX_SHARD_BYTES = 5_000_000_000
"""Largest size of a file of weights, unless a single tensor is larger."""


def save_model(
    folder: str | FilePath, model: Model, params: Tree, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes `config.json` and safetensors that transformers loads, in the parameters' dtype.

    Of a model that also reads images, the language model is written alone.

    Each file is written atomically. `config.json`, which loading requires, is written last. The
    tokenizer is not written.

    Args:
      folder: Output folder; it is created.
      model: Model.
      params: Parameters, without bound adapters.
      max_shard_bytes: Approximate size above which the weights are split into several files with
        an index.

    Raises:
      ValueError: A kernel has an adapter bound to it.
    """
    folder = FilePath(folder)
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if isinstance(leaf, AdaptedKernel):
            raise ValueError(f"{join_path(path)} has an adapter bound to it; merge it first")
    model = _language_model_alone(model)
    tensors = list(_tensors(leaves, model))
    shards = _split(tensors, max_shard_bytes)
    # Removed first: an interrupted save must not leave an index that disagrees with its files.
    (folder / CONFIG).unlink(missing_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    else:
        (folder / WEIGHTS).unlink(missing_ok=True)
        _write_shards(folder, shards)
    write_json(folder / CONFIG, _config(model, leaves))


def _language_model_alone(model: Model) -> Model:
    """Returns the model as one of a family without other parts, if it has any."""
    family, whole = model.family, model.hf_config
    if family.alone is None:
        return model
    shared = {name: whole[name] for name in _TOKEN_IDS if name in whole}
    config = dict(family.text_defaults) | shared | whole[family.text_part]
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    config["model_type"] = family.alone.model_type
    return dataclasses.replace(model, family=family.alone, hf_json=json.dumps(config))


def _tensors(leaves: dict[Path, Any], model: Model) -> Iterator[TensorToWrite]:
    """Yields the model's tensors in Hugging Face's layout, fetched when they are written."""
    names = model.hf_names()
    for path, leaf in leaves.items():
        shape = names[path].stored_shape(leaf.shape)
        for index, name in names[path].stored_names(leaf.shape):
            yield TensorToWrite(
                name=name,
                dtype=np.dtype(leaf.dtype),
                shape=shape,
                fetch=_fetch(leaf, index, transposed=names[path].transposed),
            )


def _fetch(
    leaf: jax.Array | np.ndarray, index: Index, *, transposed: bool
) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        array = np.asarray(leaf[index])
        return array.swapaxes(-1, -2) if transposed else array

    return fetch


def _split(tensors: list[TensorToWrite], max_bytes: int) -> list[list[TensorToWrite]]:
    """Groups the tensors in order, up to `max_bytes` per group; a larger tensor is alone."""
    groups: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def _write_shards(folder: FilePath, shards: list[list[TensorToWrite]]) -> None:
    stem = WEIGHTS.removesuffix(".safetensors")
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, {"format": "pt"})
        weight_map.update({tensor.name: file for tensor in shard})
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _config(model: Model, leaves: dict[Path, Any]) -> dict[str, Any]:
    """Returns the model's `config.json` with the dtype of the parameters."""
    config = {"architectures": [model.family.architecture], **model.hf_config}
    # Parameters are written as they are, whatever format they were read from.
    for name in ("auto_map", "quantization_config"):
        config.pop(name, None)
    shapes = flatten(model.abstract_params(jnp.bfloat16))
    narrow = (path for path, leaf in shapes.items() if leaf.dtype == jnp.bfloat16)
    dtypes = {str(leaves[path].dtype) for path in narrow}
    if len(dtypes) == 1:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtypes.pop()
    return config
