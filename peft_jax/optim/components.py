"""Chooses values for the arrays of a tree by the components of their paths."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from peft_jax.core import names_of


def component_values(tree: Any, values: Mapping[str, Any], default: Any) -> Any:
    """Returns a tree with each leaf's value, chosen by the components of its path.

    Args:
      tree: Nested dictionaries.
      values: Values by path component; the innermost component of a path decides.
      default: Value of a leaf whose path has none of the components.

    Example:
      >>> component_values({"head": {"kernel": 0, "bias": 0}, "q": {"a": 0}}, {"head": 5.0}, 1.0)
      {'head': {'bias': 5.0, 'kernel': 5.0}, 'q': {'a': 1.0}}
    """

    def value(key_path: tuple[Any, ...], leaf: Any) -> Any:
        del leaf
        return next((values[c] for c in reversed(names_of(key_path)) if c in values), default)

    return jax.tree_util.tree_map_with_path(value, tree)


def component_products(tree: Any, factors: Mapping[str, Any]) -> Any:
    """Returns a tree with the product of the factors of all components of each leaf's path.

    Args:
      tree: Nested dictionaries.
      factors: Factors by path component; a leaf without any of the components has 1.

    Example:
      >>> tree = {"self_attn": {"a": 0, "b": 0}, "mlp": {"b": 0}, "norm": {"scale": 0}}
      >>> component_products(tree, {"self_attn": 4.0, "b": 16.0})
      {'mlp': {'b': 16.0}, 'norm': {'scale': 1.0}, 'self_attn': {'a': 4.0, 'b': 64.0}}
    """

    def value(key_path: tuple[Any, ...], leaf: Any) -> Any:
        del leaf
        return math.prod((factors[c] for c in names_of(key_path) if c in factors), start=1.0)

    return jax.tree_util.tree_map_with_path(value, tree)
