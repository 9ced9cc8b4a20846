"""Preconditions the gradients of low-rank pairs by the Riemannian metric of their product."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.core import Path, flatten, names_of

_A, _B, _VALUES = "a", "b", "e"


def riemannian_preconditioning(damping: float) -> optax.GradientTransformation:
    """Multiplies the gradients of each pair A [d_in, r], B [r, d_out] by r × r preconditioners.

        g_A ← g_A (B Bᵀ + δI)⁻¹,   g_B ← (Aᵀ A + δI)⁻¹ g_B

    The step of the product AB then does not depend on how it is factored, and A and B learn at
    comparable rates. Both preconditioners are those before the step. Stacked pairs have one each.
    Arrays outside pairs keep their gradients: DoRA's magnitudes, biases, or the second branch of a
    hybrid.

    Args:
      damping: δ.

    Returns:
      A transformation without state; `update` needs the parameters.

    Raises:
      ValueError: In `init`: there is no pair.

    Source: Zhang and Pilanci, 2024, arXiv 2402.02347. Hugging Face PEFT's
    `create_riemannian_optimizer` has the same form, with δ = 0.01.

    Example:
      >>> params = {"a": jnp.array([[2.0], [0.0]]), "b": jnp.array([[3.0]])}
      >>> precondition = riemannian_preconditioning(damping=1.0)
      >>> state = precondition.init(params)
      >>> gradients = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 1))}
      >>> found, _ = precondition.update(gradients, state, params)
      >>> [round(float(found[name][0, 0]), 3) for name in "ab"]
      [0.1, 0.2]
    """

    def init(params: Any) -> optax.EmptyState:
        flat = flatten(params)
        if jax.tree.leaves(params) and not _pairs(flat):
            raise ValueError(
                "optimizer.name is 'riemannian_adamw', which preconditions trainable pairs of A"
                f" [d_in, r] and B [r, d_out], but there are only {', '.join(_names(flat))}; use"
                " adamw, or a method that trains both, such as lora, dora or hybrid"
            )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params must be given to the update of riemannian_preconditioning")
        flat, here = flatten(updates), flatten(params)
        for pair in _pairs(here):
            a, b = here[(*pair, _A)], here[(*pair, _B)]
            damped = damping * jnp.eye(a.shape[-1], dtype=a.dtype)
            g_a, g_b = flat[(*pair, _A)], flat[(*pair, _B)]
            flat[(*pair, _A)] = jnp.linalg.solve(b @ b.mT + damped, g_a.mT).mT
            flat[(*pair, _B)] = jnp.linalg.solve(a.mT @ a + damped, g_b)
        found = jax.tree_util.tree_map_with_path(lambda path, _: flat[names_of(path)], updates)
        return found, state

    return optax.GradientTransformation(init, update)


def _pairs(flat: dict[Path, Any]) -> list[Path]:
    """Returns the paths above a pair A, B whose ranks agree, without AdaLoRA's three factors."""
    return [
        path[:-1]
        for path, a in flat.items()
        if path[-1] == _A
        and (b := flat.get((*path[:-1], _B))) is not None
        and (*path[:-1], _VALUES) not in flat
        and a.ndim == b.ndim >= 2
        and a.shape[:-2] == b.shape[:-2]
        and a.shape[-1] == b.shape[-2]
    ]


def _names(flat: dict[Path, Any]) -> list[str]:
    """Returns the last keys of all paths, sorted."""
    return sorted({path[-1] for path in flat})
