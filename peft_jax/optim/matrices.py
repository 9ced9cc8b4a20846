"""Finds the matrices among trainable arrays, and orthogonalizes them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.core import Path, is_stacked, names_of
from peft_jax.core.trees import EMBEDDING, KERNEL, TABLE, has_experts_axis

MATRIX, LOOKUP, OTHER = "matrix", "lookup", "other"
"""Kinds of trainable arrays; see `kind_of`."""

_LOOKED_UP = (EMBEDDING, TABLE, "tokens")
"""Last keys of arrays whose rows are looked up: one for each token."""

_HEADS = ("lm_head", "classifier")
"""Root keys of maps to one output per token or label."""

_NO_MATRICES = ("r", "u", "phases", "reflections")
"""Last keys of parameters of rotations: their trailing axes are blocks or vectors, not a map."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Muon (Jordan et al., 2024)."""


def kind_of(path: Path, leaf: Any) -> str:
    """Returns the kind of a trainable array, which decides how a matrix optimizer updates it.

    Returns:
      "matrix": a linear map in the trailing two axes, such as LoRA's A or B, or a whole kernel.
      "lookup": an embedding [vocab, embed], single rows of one, or a head. Its rows or columns
      belong to single tokens or labels.
      "other": a vector, or the parameters of a rotation.

    Example:
      >>> kernel = jnp.zeros((4, 8, 2))
      >>> kind_of(("layers", "q_proj", "kernel", "a"), kernel)
      'matrix'
      >>> kind_of(("layers", "norm", "scale"), jnp.zeros((4, 8)))
      'other'
      >>> kind_of(("lm_head", "kernel"), jnp.zeros((8, 32)))
      'lookup'
    """
    axes = leaf.ndim - stack_axes(path)
    if axes != 2 or path[-1] in _NO_MATRICES:
        return OTHER
    if path[-1] in _LOOKED_UP or (path[-1] == KERNEL and path[0] in _HEADS):
        return LOOKUP
    return MATRIX


def stack_axes(path: Path) -> int:
    """Returns the number of leading axes over layers, and over experts, of the leaf at `path`."""
    return int(is_stacked(path)) + int(has_experts_axis(path))


def kinds(tree: Any) -> Any:
    """Returns a tree with the kind of each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: kind_of(names_of(path), leaf), tree)


def check_matrices(name: str, tree: Any) -> None:
    """Raises ValueError unless a tree has a matrix.

    A tree without leaves is accepted: `optax.tree_map_params` initializes with one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if leaves and all(kind_of(names_of(path), leaf) != MATRIX for path, leaf in leaves):
        raise ValueError(
            f"optimizer.name is {name!r}, which is for matrices, but no trainable array is one:"
            f" {'.'.join(names_of(leaves[0][0]))} has the shape {tuple(leaves[0][1].shape)}; use"
            " adamw, or a method that trains matrices, such as lora"
        )


def orthogonalized(
    x: Float[Array, "*stack m n"], *, steps: int = 5, eps: float = 1e-7
) -> Float[Array, "*stack m n"]:
    """Returns matrices with singular values near 1 and the singular vectors of `x`.

    The iteration X ← aX + (bXXᵀ + c(XXᵀ)²)X begins at x / ‖x‖. Five steps bring singular values to
    about 0.7 to 1.2, unless they are far below the largest one. Zero stays zero.

    Args:
      x: Matrices in the trailing two axes.
      steps: Number of iterations.
      eps: Constant added to the norm.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
    """
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / (jnp.linalg.norm(wide, axis=(-2, -1), keepdims=True) + eps)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT
