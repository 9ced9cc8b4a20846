"""Nested dictionaries of arrays, addressed by path.

A model's parameters, an adapter's arrays and an optimizer's state are nested dictionaries with
string keys. A path is the tuple of keys from the root to a leaf: ("layers", "mlp", "up_proj",
"kernel"). What stands under the key `STACKED` at the root belongs to the transformer blocks and
carries the block's index as its leading axis.
"""

from collections.abc import Callable, Mapping
from typing import Any

Path = tuple[str, ...]
Tree = dict[str, Any]

STACKED = "layers"
"""The root key whose leaves are stacked over transformer blocks: [layers, ...]."""


def is_stacked(path: Path) -> bool:
    """Whether the leaf at `path` has the transformer blocks as its leading axis."""
    return path[0] == STACKED


def join_path(path: Path) -> str:
    """A path as one dotted string: "layers.mlp.up_proj.kernel"."""
    return ".".join(path)


def flatten(
    tree: Mapping[str, Any], *, is_leaf: Callable[[Path, Any], bool] | None = None
) -> dict[Path, Any]:
    """The leaves of a nested dictionary by path, in the order of the keys.

    Args:
      tree: nested dictionaries; whatever is not a dictionary is a leaf. Empty ones vanish.
      is_leaf: stops the descent where it returns true for (path, subtree).

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
    """The nested dictionary whose leaves are given by path; the inverse of `flatten`.

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
