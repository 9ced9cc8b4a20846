"""Drops copies of the base's weights from a Hugging Face PEFT adapter, and reads the base's own."""

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwix import QArray

from peft_jax.adapters.trainable_tokens import TrainableTokensForm
from peft_jax.core import EMBEDDING, KERNEL, Kernel, Path, Tree, flatten, is_stacked, join_path
from peft_jax.hub.adapter_arrays import modules_of, read_tensor
from peft_jax.hub.load import open_sources
from peft_jax.hub.peft_config import HEAD
from peft_jax.hub.peft_names import PEFT_PREFIX
from peft_jax.hub.tensors import StoredTensor
from peft_jax.models import Model


def drop_base_copies(
    stored: Mapping[str, StoredTensor], model: Model, params: Tree, *, what: str
) -> dict[str, StoredTensor]:
    """Drops the copies of base weights that PEFT saves along with an adapted head.

    Args:
      stored: Tensors of a PEFT adapter, by name.
      model: Base model.
      params: Parameters of the base. If they are shapes only, the base's files are read when the
        model's origin is known.
      what: Name of the adapter in messages.

    Raises:
      ValueError: A copy differs from the base.
    """
    leaves = flatten(params)
    copies = {
        f"{PEFT_PREFIX}{module}.base_layer.weight": (path, layer)
        for path in leaves
        if path[-1] in (KERNEL, EMBEDDING)
        for layer, module in enumerate(modules_of(model, path))
    }
    for name in stored.keys() & copies.keys():
        path, layer = copies[name]
        leaf = leaves[path]
        if not isinstance(leaf, jax.Array) and model.origin:
            leaf = _read_leaf(model, path, leaf)
        if not _is_copy(stored[name], leaf, path, layer):
            raise ValueError(
                f"{what} contains {name}, which differs from the base's {join_path(path)}; load the"
                " base that it was trained on, or merge the adapter in PEFT and load the result"
            )
    return {name: tensor for name, tensor in stored.items() if name not in copies}


def base_kernel(model: Model, path: Path, leaf: Any) -> Kernel:
    """Returns a kernel of the base as arrays, from its files if `leaf` has shapes only.

    Raises:
      ValueError: There are shapes only, and the model's files are unknown.
    """
    if all(isinstance(part, jax.Array) for part in jax.tree.leaves(leaf)):
        return leaf
    if not model.origin or isinstance(leaf, QArray):
        raise ValueError(
            f"this adapter needs the values of {join_path(path)}, but only its shape is given; give"
            " the parameters that load_model returns"
        )
    return _read_leaf(model, path, leaf)


def _read_leaf(model: Model, path: Path, leaf: Any) -> jax.Array:
    """Reads a leaf of the base from its files, in the dtype of `leaf`."""
    whole = np.empty(leaf.shape, leaf.dtype)
    source = open_sources(FilePath(model.origin), model)[path]
    source.read_into(whole, tuple((0, size) for size in leaf.shape))
    return jnp.asarray(whole)


def _is_copy(tensor: StoredTensor, leaf: Any, path: Path, layer: int) -> bool:
    """Returns whether a stored tensor equals a leaf of the base, in the leaf's dtype.

    A kernel is stored as [out, in], and an embedding as it is.
    """
    shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
    if tensor.shape != (shape if path[-1] == EMBEDDING else shape[::-1]):
        return False
    if not isinstance(leaf, jax.Array):
        return True
    kernel = leaf[layer] if is_stacked(path) else leaf
    values = read_tensor(tensor)
    values = (values if path[-1] == EMBEDDING else values.T).astype(kernel.dtype)
    # Each process compares its own shards.
    return all(
        np.array_equal(np.asarray(shard.data), values[shard.index])
        for shard in kernel.addressable_shards
    )


def drop_tied_tokens(
    stored: Mapping[str, StoredTensor], model: Model, *, what: str
) -> dict[str, StoredTensor]:
    """Drops the copy of trained tokens that PEFT saves for a head that is tied to the embedding.

    Args:
      stored: Tensors of a PEFT adapter, by name.
      model: Base model.
      what: Name of the adapter in messages.

    Raises:
      ValueError: The copy differs from the tokens of the embedding.
    """
    (end,) = TrainableTokensForm.names
    of_head = f"{PEFT_PREFIX}{HEAD}.{end}"
    others = [name for name in stored if name.endswith(f".{end}") and name != of_head]
    if of_head not in stored or not (model.config.tie_word_embeddings and len(others) == 1):
        return dict(stored)
    one, other = read_tensor(stored[of_head]), read_tensor(stored[others[0]])
    if not np.array_equal(one, other):
        raise ValueError(
            f"{what} has different tokens for {HEAD} and the embedding, but config.json sets"
            " tie_word_embeddings to true"
        )
    return {name: tensor for name, tensor in stored.items() if name != of_head}
