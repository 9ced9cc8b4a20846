"""An adapter's arrays as named tensors, one a layer, and back."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters import AdapterState, Targets
from peft_jax.core import Path, flatten, is_stacked, join_path, unflatten
from peft_jax.hub.finite import check_finite
from peft_jax.hub.tensors import StoredTensor, TensorToWrite
from peft_jax.models import Model

_NAMED_AT_MOST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayTensors:
    """The tensors one of an adapter's arrays is stored as.

    Attributes:
      tree: which of `AdapterState`'s trees has the array.
      path: where in it.
      names: of the tensors: one a layer where the array is stacked, else one.
      shape: of each tensor.
      dtype: of each tensor.
      transposed: whether the tensors are the array's transposes.
    """

    tree: Literal["trainable", "constant"]
    path: Path
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool = False


def adapted_tensors(model: Model, targets: Targets, state: AdapterState) -> list[ArrayTensors]:
    """The tensors of the arrays over adapted kernels, in this library's own form.

    Args:
      model: gives the modules' names.
      targets: which kernels are adapted.
      state: the arrays, or abstract ones.
    """
    found = []
    trees: tuple[Literal["trainable", "constant"], ...] = ("trainable", "constant")
    for tree in trees:
        for path, array in flatten(getattr(state, tree)).items():
            leaf = path[: path.index("kernel") + 1] if "kernel" in path else path
            if leaf not in targets.adapted:
                continue
            rest = ".".join(path[len(leaf) :])
            found.append(
                ArrayTensors(
                    tree=tree,
                    path=path,
                    names=tuple(f"{name}.{rest}" for name in modules_of(model, leaf)),
                    shape=array.shape[1:] if is_stacked(path) else array.shape,
                    dtype=np.dtype(array.dtype),
                )
            )
    return found


def trained_tensors(
    model: Model, targets: Targets, state: AdapterState, *, prefix: str = ""
) -> list[ArrayTensors]:
    """The tensors of the leaves that are trained themselves, as in the base's checkpoint.

    Args:
      model: gives the tensors' names.
      targets: which leaves are trained.
      state: the arrays, or abstract ones.
      prefix: put before every name.
    """
    names = model.hf_names()
    leaves = flatten(state.trainable)
    found = []
    for path in targets.trained:
        tensor, array = names[path], leaves[path]
        layers = range(model.config.num_layers) if is_stacked(path) else (None,)
        shape = array.shape[1:] if is_stacked(path) else array.shape
        found.append(
            ArrayTensors(
                tree="trainable",
                path=path,
                names=tuple(prefix + tensor.name(layer) for layer in layers),
                shape=shape[::-1] if tensor.transposed else shape,
                dtype=np.dtype(array.dtype),
                transposed=tensor.transposed,
            )
        )
    return found


def modules_of(model: Model, path: Path) -> list[str]:
    """The Hugging Face names of the modules that hold a leaf: one a layer, or one."""
    if not is_stacked(path):
        return [model.module_name(path)]
    return [model.module_name(path, layer) for layer in range(model.config.num_layers)]


def tensors_to_write(
    arrays: Iterable[ArrayTensors], state: AdapterState
) -> Iterator[TensorToWrite]:
    """The tensors, each fetched when its turn comes."""
    trees = {tree: flatten(getattr(state, tree)) for tree in ("trainable", "constant")}
    for item in arrays:
        for index, name in enumerate(item.names):
            array = trees[item.tree][item.path]
            yield TensorToWrite(
                name=name, dtype=item.dtype, shape=item.shape, fetch=_fetch(array, item, index)
            )


def _fetch(array: jax.Array, item: ArrayTensors, index: int) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        one = np.asarray(array[index] if is_stacked(item.path) else array)
        return one.T if item.transposed else one

    return fetch


def read_arrays(
    arrays: Iterable[ArrayTensors], stored: Mapping[str, StoredTensor]
) -> dict[tuple[str, Path], jax.Array]:
    """The arrays by tree and path, from tensors that `check_tensors` has seen.

    Where a tensor's dtype is not the array's, it is converted.
    """
    found: dict[tuple[str, Path], jax.Array] = {}
    for item in arrays:
        tensors = [read_tensor(stored[name]) for name in item.names]
        if item.transposed:
            tensors = [tensor.T for tensor in tensors]
        found[item.tree, item.path] = stack(item.path, tensors, item.dtype)
    return found


def stack(path: Path, tensors: list[np.ndarray], dtype: Any) -> jax.Array:
    """One array of a leaf's tensors, stacked where the leaf is."""
    return jnp.asarray(np.stack(tensors) if is_stacked(path) else tensors[0], dtype)


def make_state(arrays: Mapping[tuple[str, Path], jax.Array]) -> AdapterState:
    """The state whose arrays are given by tree and path."""
    trees: dict[str, dict[Path, jax.Array]] = {"trainable": {}, "constant": {}}
    for (tree, path), array in arrays.items():
        trees[tree][path] = array
    return AdapterState(**{tree: unflatten(leaves) for tree, leaves in trees.items()})


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """A whole tensor, in its own dtype.

    Raises:
      ValueError: it holds NaN or infinity.
    """
    whole = np.empty(tensor.shape, tensor.numpy_dtype)
    for rows, values in tensor.pieces():
        check_finite(values, whole.dtype, name=tensor.name, where=str(tensor.file))
        whole[rows] = values
    return whole


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], what: str
) -> None:
    """Checks that a file has just the tensors that are wanted, in the wanted shapes.

    Args:
      wanted: shapes by name.
      stored: the file's tensors.
      what: what the file is, for messages.

    Raises:
      ValueError: tensors are missing, left over or of another shape; they are named.
    """
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted]
    wrong = [
        f"{name} is {list(stored[name].shape)} and would have to be {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != tuple(shape)
    ]
    parts = []
    if missing:
        parts.append(f"it lacks {listing(missing)}")
    if extra:
        parts.append(f"it has {listing(extra)}, for which the model has no place")
    if wrong:
        parts.append(f"tensors have another shape: {listing(wrong)}")
    if parts:
        raise ValueError(f"{what} does not fit this model: {'; '.join(parts)}")


def check_state(state: AdapterState, expected: AdapterState) -> None:
    """Checks that arrays are what a specification makes.

    Raises:
      ValueError: arrays are missing, left over, or of another shape or dtype; they are named.
    """
    trees: tuple[Literal["trainable", "constant"], ...] = ("trainable", "constant")
    for tree in trees:
        found, wanted = flatten(getattr(state, tree)), flatten(getattr(expected, tree))
        wrong = [
            f"{join_path(path)} is missing" if path not in found else f"{join_path(path)} is extra"
            for path in sorted(found.keys() ^ wanted.keys())
        ] + [
            f"{join_path(path)} is {found[path].dtype} {list(found[path].shape)}, not"
            f" {leaf.dtype} {list(leaf.shape)}"
            for path, leaf in wanted.items()
            if path in found and (found[path].shape, found[path].dtype) != (leaf.shape, leaf.dtype)
        ]
        if wrong:
            raise ValueError(
                f"the adapter's {tree} arrays are not what its specification makes for this model:"
                f" {listing(wrong)}"
            )


def listing(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
