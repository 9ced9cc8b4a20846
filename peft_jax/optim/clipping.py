"""Clips gradients by norm, each group of trainable arrays by itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from peft_jax.core.validation import check_positive
from peft_jax.optim.components import component_values

ALL = "all"
"""Name of the only group."""

REST = "rest"
"""Name of the group of arrays outside all named groups, beside others."""


@dataclasses.dataclass(frozen=True)
class GroupClipping:
    """Maximum norm of each group's gradients.

    One norm over all arrays would let the group with the larger gradient decide how far the others
    are scaled: a rotation's gradient would shrink the low-rank branch's, and a new head's those of
    the adapter.

    Attributes:
      max_norm: Maximum norm of a group's gradients over all its arrays.
      components: Path components, such as a hybrid's branches, whose arrays are a group. All other
        arrays are one more. The innermost component of a path decides.

    Raises:
      ValueError: The norm is not positive.

    Example:
      >>> clipping = GroupClipping(1.0, ("low_rank", "rotation"))
      >>> factors = clipping.factors({"low_rank": jnp.array([4.0]), "rotation": jnp.array([0.5])})
      >>> {name: float(factor) for name, factor in factors.items()}
      {'low_rank': 0.25, 'rotation': 1.0}
    """

    max_norm: float
    components: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_positive("max_norm", self.max_norm)

    def factors(self, gradients: Any) -> dict[str, Float[Array, ""]]:
        """Returns the factor that clipping multiplies each group's gradients by, at most 1.

        Returns:
          Float32 [] by group: a component, "rest", or "all" where no array has a component.
        """
        norms = {name: optax.tree.norm(leaves) for name, leaves in self._groups(gradients).items()}
        return {
            name: jnp.where(norm < self.max_norm, 1.0, self.max_norm / norm).astype(jnp.float32)
            for name, norm in norms.items()
        }

    def clip(self, gradients: Any) -> Any:
        """Returns the gradients, with those of each group scaled to at most `max_norm`."""
        clip = optax.clip_by_global_norm(self.max_norm)
        clipped = {
            name: iter(clip.update(leaves, optax.EmptyState())[0])
            for name, leaves in self._groups(gradients).items()
        }
        return jax.tree.map(lambda name: next(clipped[name]), self._labels(gradients))

    def before(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """Returns an optimizer that gives `inner` clipped gradients; its state is that of `inner`.

        A wrapper around it, such as `hybrid_mixing`, still receives the gradients as they are.
        """
        inner = optax.with_extra_args_support(inner)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            return inner.update(self.clip(updates), state, params, **extra)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    def _labels(self, tree: Any) -> Any:
        """Returns a tree with the name of each leaf's group."""
        own = component_values(tree, {name: name for name in self.components}, "")
        rest = REST if any(jax.tree.leaves(own)) else ALL
        return jax.tree.map(lambda name: name or rest, own)

    def _groups(self, tree: Any) -> dict[str, list[Array]]:
        """Returns the leaves of each group, in the tree's order."""
        groups: dict[str, list[Array]] = {}
        for name, leaf in zip(
            jax.tree.leaves(self._labels(tree)), jax.tree.leaves(tree), strict=True
        ):
            groups.setdefault(name, []).append(leaf)
        return groups
