"""Scion: steps of a fixed size in the norm that suits each array."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from peft_jax.core import Path, names_of
from peft_jax.core.trees import KERNEL
from peft_jax.optim.matrices import LOOKUP, MATRIX, kind_of, orthogonalized, stack_axes

_EPS = 1e-8


def scale_by_scion(b1: float) -> optax.GradientTransformation:
    """Returns the directions of Scion: −lmo(d), for the averaged gradient d.

    d ← b1 d + (1 − b1) g, with α = 1 − b1 in the paper. The linear minimization oracle of an array
    is that of its norm (tables 3 and 4 of the paper), here for kernels [d_in, d_out]:

    - matrices: the spectral norm. −lmo(d) = √(d_out / d_in) U Vᵀ, where d = U S Vᵀ.
    - heads: the largest entry, for inputs of root mean square 1. −lmo(d) = sign(d) / d_in.
    - embeddings: the largest entry, for inputs of one token. −lmo(d) = sign(d), which the paper
      recommends where the head shares them.
    - other arrays, one layer at a time: the root mean square. −lmo(d) = d / ‖d‖_RMS.

    With the learning rate γρ this is the unconstrained method (algorithm 1). With a weight decay
    of 1/ρ as well, which every update multiplies by the learning rate, it is the constrained one
    (algorithm 2): x ← (1 − γ) x + γρ lmo(d), which stays within a ball of radius ρ. U Vᵀ is that
    of five Newton-Schulz iterations, as in the authors' code.

    Args:
      b1: Decay of the averaged gradient.

    Source: Pethick et al., 2025, arXiv 2502.07529.

    Example:
      >>> scion = scale_by_scion(b1=0.9)
      >>> gradient = {"scale": jnp.array([3.0, -4.0])}
      >>> direction, _ = scion.update(gradient, scion.init(gradient))
      >>> [round(x, 3) for x in direction["scale"].tolist()]
      [0.849, -1.131]
    """

    def init(params: Any) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        average = jax.tree.map(lambda d, g: b1 * d + (1.0 - b1) * g, state.trace, updates)
        directions = jax.tree_util.tree_map_with_path(
            lambda path, d: _direction(names_of(path), d), average
        )
        return directions, optax.TraceState(average)

    return optax.GradientTransformation(init, update)


def _direction(path: Path, d: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns −lmo of one array's averaged gradient, in the norm of its kind."""
    kind = kind_of(path, d)
    if kind == MATRIX:
        d_in, d_out = d.shape[-2:]
        return math.sqrt(d_out / d_in) * orthogonalized(d)
    if kind == LOOKUP:
        return jnp.sign(d) / (d.shape[-2] if path[-1] == KERNEL else 1)
    axes = tuple(range(min(stack_axes(path), d.ndim), d.ndim))
    rms = jnp.sqrt(jnp.mean(jnp.square(d), axis=axes, keepdims=True))
    return d / (rms + _EPS)
