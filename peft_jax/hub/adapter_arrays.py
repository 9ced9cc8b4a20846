"""Converts between an adapter's arrays and named tensors, one per layer."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters import AdapterState, Targets
from peft_jax.adapters.virtual_method import virtual_arrays
from peft_jax.core import Path, flatten, is_stacked, join_path, unflatten
from peft_jax.hub.finite import check_finite
from peft_jax.hub.tensors import INTEGERS, StoredTensor, TensorToWrite
from peft_jax.models import TrainableModel

MAX_LISTED = 8
"""Largest number of names that a message lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayTensors:
    """Describes the tensors that store one of an adapter's arrays.

    Attributes:
      tree: Tree of `AdapterState` that holds the array.
      path: Path of the array in the tree.
      names: Names of the tensors; one per layer if the array is stacked.
      shape: Shape of each tensor.
      dtype: Dtype of each tensor.
      transposed: Whether the tensors are transposed.
      first: Number of layers before the first tensor's; their rows are zero.
    """

    tree: Literal["trainable", "constant"]
    path: Path
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool = False
    first: int = 0


def adapted_tensors(
    model: TrainableModel, targets: Targets, state: AdapterState
) -> list[ArrayTensors]:
    """Describes the tensors of adapted kernels' arrays, in this library's format.

    Args:
      model: Base model, for the modules' names.
      targets: Adapted kernels.
      state: Adapter arrays or shapes.
    """
    found = []
    trees: tuple[Literal["trainable", "constant"], ...] = ("trainable", "constant")
    for tree in trees:
        for path, array in flatten(getattr(state, tree)).items():
            starts = (path[:end] for end in range(1, len(path)))
            leaf = next((start for start in starts if start in targets.adapted), None)
            if leaf is None:
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


def virtual_tensors(state: AdapterState) -> list[ArrayTensors]:
    """Describes the tensors of virtual tokens' arrays, in this library's format.

    Args:
      state: Adapter arrays or shapes.
    """
    return [
        ArrayTensors(
            tree="trainable",
            path=path,
            names=(join_path(path),),
            shape=array.shape,
            dtype=np.dtype(array.dtype),
        )
        for path, array in virtual_arrays(state.trainable).items()
    ]


def trained_tensors(
    model: TrainableModel, targets: Targets, state: AdapterState, *, prefix: str = ""
) -> list[ArrayTensors]:
    """Describes the tensors of fully trainable leaves, named as in the base's checkpoint.

    Args:
      model: Base model, for the tensors' names.
      targets: Fully trainable leaves.
      state: Adapter arrays or shapes.
      prefix: Prefix of every name.
    """
    names = model.hf_names()
    leaves = flatten(state.trainable)
    found = []
    for path in targets.trained:
        tensor, array = names[path], leaves[path]
        rows = tensor.rows(model.num_layers)
        shape = array.shape[1:] if is_stacked(path) else array.shape
        found.append(
            ArrayTensors(
                tree="trainable",
                path=path,
                names=tuple(prefix + name for name in rows.values()),
                shape=(*shape[:-2], shape[-1], shape[-2]) if tensor.transposed else shape,
                dtype=np.dtype(array.dtype),
                transposed=tensor.transposed,
                first=tensor.first,
            )
        )
    return found


def modules_of(model: TrainableModel, path: Path) -> list[str]:
    """Returns the Hugging Face names of a leaf's modules; one per layer if it is stacked."""
    if not is_stacked(path):
        return [model.module_name(path)]
    return [model.module_name(path, layer) for layer in model.layers_of(path)]


def tensors_to_write(
    arrays: Iterable[ArrayTensors], state: AdapterState
) -> Iterator[TensorToWrite]:
    """Yields the tensors, each fetched when it is written."""
    trees = {tree: flatten(getattr(state, tree)) for tree in ("trainable", "constant")}
    for item in arrays:
        for index, name in enumerate(item.names):
            array = trees[item.tree][item.path]
            yield TensorToWrite(
                name=name, dtype=item.dtype, shape=item.shape, fetch=_fetch(array, item, index)
            )


def _fetch(array: jax.Array, item: ArrayTensors, index: int) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        one = np.asarray(array[item.first + index] if is_stacked(item.path) else array)
        return one.swapaxes(-1, -2) if item.transposed else one

    return fetch


def read_arrays(
    arrays: Iterable[ArrayTensors], stored: Mapping[str, StoredTensor]
) -> dict[tuple[str, Path], jax.Array]:
    """Reads arrays by tree and path, from tensors that passed `check_tensors`.

    Tensors are converted to the arrays' dtypes.
    """
    found: dict[tuple[str, Path], jax.Array] = {}
    for item in arrays:
        integers = np.issubdtype(item.dtype, np.integer)
        tensors = [read_tensor(stored[name], integers=integers) for name in item.names]
        if item.transposed:
            tensors = [tensor.swapaxes(-1, -2) for tensor in tensors]
        tensors = [np.zeros_like(tensors[0])] * item.first + tensors
        found[item.tree, item.path] = stack(item.path, tensors, item.dtype)
    return found


def stack(path: Path, tensors: list[np.ndarray], dtype: Any) -> jax.Array:
    """Combines a leaf's tensors into one array, stacked if the leaf is."""
    return jnp.asarray(np.stack(tensors) if is_stacked(path) else tensors[0], dtype)


def make_state(arrays: Mapping[tuple[str, Path], jax.Array]) -> AdapterState:
    """Builds the adapter state from arrays by tree and path."""
    trees: dict[str, dict[Path, jax.Array]] = {"trainable": {}, "constant": {}}
    for (tree, path), array in arrays.items():
        trees[tree][path] = array
    return AdapterState(**{tree: unflatten(leaves) for tree, leaves in trees.items()})


def read_tensor(tensor: StoredTensor, *, integers: bool = False) -> np.ndarray:
    """Reads a whole tensor in its stored dtype.

    Args:
      tensor: Stored tensor.
      integers: Whether it must hold integers, which a file may have as floating-point numbers.

    Raises:
      ValueError: It holds NaN or infinity, or other numbers than integers.
    """
    if integers and tensor.dtype in INTEGERS:
        whole = np.empty(tensor.shape, tensor.stored_dtype)
        for rows, values in tensor.pieces(dtype=whole.dtype):
            whole[rows] = values
        return whole
    whole = np.empty(tensor.shape, tensor.numpy_dtype)
    for rows, values in tensor.pieces():
        check_finite(values, whole.dtype, name=tensor.name, where=str(tensor.file))
        whole[rows] = values
    if not integers:
        return whole
    if (whole != np.rint(whole)).any() or (np.abs(whole) >= 2**31).any():
        raise ValueError(
            f"{tensor.name} in {tensor.file} must hold integers, but has other numbers"
        )
    return whole.astype(np.int32)


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], what: str
) -> None:
    """Raises ValueError unless a file has exactly the expected tensors.

    Args:
      wanted: Expected shapes by name.
      stored: Tensors of the file by name.
      what: Name of the file in messages.

    Raises:
      ValueError: Tensors are missing, unexpected or wrongly shaped; the message names them.
    """
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted]
    wrong = [
        f"{name} has shape {list(stored[name].shape)}, but must have {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != tuple(shape)
    ]
    parts = []
    if missing:
        parts.append(f"it lacks {listing(missing)}")
    if extra:
        parts.append(f"it has {listing(extra)}, which match no module")
    if wrong:
        parts.append(listing(wrong))
    if parts:
        raise ValueError(f"{what} does not fit this model: {'; '.join(parts)}")


def check_state(state: AdapterState, expected: AdapterState) -> None:
    """Raises ValueError unless arrays match those of a specification.

    Args:
      state: Arrays.
      expected: Shapes from `AdapterSpec.abstract`.

    Raises:
      ValueError: Arrays are missing, unexpected, or of another shape or dtype; the message names
        them.
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
                f"the adapter's {tree} arrays do not match its specification for this model:"
                f" {listing(wrong)}"
            )


def listing(names: list[str]) -> str:
    """Joins the first few names, and counts the rest."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
