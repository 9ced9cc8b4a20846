"""Addresses the leaves of nested dictionaries by path.

A model's parameters, an adapter's arrays and an optimizer's state are nested dictionaries with
string keys. A path is the tuple of keys from the root to a leaf: ("layers", "mlp", "up_proj",
"kernel"). Leaves under the root key `STACKED` belong to the transformer blocks. Their leading axis
is the block index. If only some blocks have a leaf, it has rows for those alone, in their order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.tree_util import KeyPath

Path = tuple[str, ...]
Tree = dict[str, Any]

STACKED = "layers"
"""The root key whose leaves are stacked over transformer blocks: [layers, ...]."""

KERNEL = "kernel"
"""Last key of a kernel of linear maps."""

EMBEDDING = "embedding"
"""Last key of an embedding [vocab, embed]. `take_rows` looks its rows up."""

TABLE = "table"
"""Last key of an embedding that is multiplied as a kernel, so that any method can adapt it."""

CORRECTION = "e_score_correction_bias"
"""Last key of a router's corrections, which balance experts by themselves."""

UNTRAINED = (CORRECTION, "layer_scalar")
"""Last keys of arrays that belong to a model, but are not trained."""


def is_stacked(path: Path) -> bool:
    """Returns whether the leading axis of the leaf at `path` is the transformer block index."""
    return path[0] == STACKED


def is_experts(path: Path) -> bool:
    """Returns whether the leaf at `path` belongs to experts: [layers, experts, ...].

    Example:
      >>> is_experts(("layers", "mlp", "experts", "down_proj", "kernel"))
      True
    """
    return is_stacked(path) and "experts" in path


SHARED = "shared"
"""Key of the arrays of an adapter that all experts of a layer share."""

LOW_RANK = "low_rank"
"""Key of a hybrid adapter's low-rank branch."""

ROTATION = "rotation"
"""Key of a hybrid adapter's rotation branch."""


def has_experts_axis(path: Path) -> bool:
    """Returns whether the second axis of the leaf at `path` is that of experts.

    The leaf is an expert's array or that of an adapter of each expert, not of one that they share.

    Example:
      >>> kernel = ("layers", "mlp", "experts", "down_proj", "kernel")
      >>> has_experts_axis(kernel), has_experts_axis((*kernel, SHARED, "a"))
      (True, False)
    """
    return is_experts(path) and SHARED not in path


def is_router(path: Path) -> bool:
    """Returns whether the leaf at `path` belongs to the router of a mixture of experts.

    Example:
      >>> is_router(("layers", "mlp", "gate", "kernel")), is_router(("layers", "mlp", "gate_proj"))
      (True, False)
    """
    return path[1:2] in (("mlp",), ("feed_forward",)) and path[2:3] in (("gate",), ("router",))


def join_path(path: Path) -> str:
    """Returns a path as one dotted string: "layers.mlp.up_proj.kernel"."""
    return ".".join(path)


def names_of(key_path: KeyPath) -> Path:
    """Returns JAX's key path as plain names, whatever kind of node each key belongs to.

    Example:
      >>> ((key_path, _),) = jax.tree_util.tree_leaves_with_path({"a": [1.0]})
      >>> names_of(key_path)
      ('a', '0')
    """
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in key_path)


def flatten(
    tree: Mapping[str, Any], *, is_leaf: Callable[[Path, Any], bool] | None = None
) -> dict[Path, Any]:
    """Returns the leaves of a nested dictionary by path, in key order.

    Args:
      tree: Nested dictionaries. Any other value is a leaf; empty dictionaries are dropped.
      is_leaf: Predicate on (path, subtree) that makes a nested dictionary a leaf.

    Example:
      >>> flatten({"a": {"b": 1, "c": 2}})
      {('a', 'b'): 1, ('a', 'c'): 2}
    """
    flat: dict[Path, Any] = {}

    def visit(path: Path, node: Any) -> None:
        if isinstance(node, Mapping) and not (path and is_leaf is not None and is_leaf(path, node)):
            for key in node:
                visit((*path, key), node[key])
        else:
            flat[path] = node

    visit((), tree)
    return flat


def unflatten(flat: Mapping[Path, Any]) -> Tree:
    """Returns the nested dictionary with the given leaves by path; inverse of `flatten`.

    Example:
      >>> unflatten({("a", "b"): 1, ("a", "c"): 2})
      {'a': {'b': 1, 'c': 2}}
    """
    tree: Tree = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree
