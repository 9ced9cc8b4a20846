"""Muon for the matrices among trainable arrays, and AdamW for the others."""

from typing import Any

import jax
import optax

from peft_jax.optim.matrices import LOOKUP, MATRIX, OTHER, check_matrices, kinds

_RMS = 0.2
"""Root mean square of an update, as that of AdamW (Liu et al., 2025, section 2.2)."""

_ADAM_B1 = 0.9

_TRAILING = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def scale_by_muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Orthogonalizes the momentum of matrices; other arrays take Adam's direction.

    The direction of a matrix [m, n] is 0.2 √max(m, n) O, where O is the orthogonalized Nesterov
    momentum. Its root mean square is about that of Adam's direction, so both take one learning
    rate. Stacked matrices are orthogonalized one by one. Embeddings and heads count among the
    other arrays, as the authors advise.

    Args:
      b1: Decay of the momentum of matrices.
      b2: Decay of the second moment of other arrays, whose first has a decay of 0.9.
      eps: Constant added to Adam's denominator.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/, in
    `optax.contrib.scale_by_muon`, with the scale of Liu et al., 2025, arXiv 2502.16982, eq. 4.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.eye(4, 2)}
      >>> muon = scale_by_muon(b1=0.95, b2=0.999, eps=1e-8)
      >>> with jax.numpy_dtype_promotion("standard"):
      ...     direction, _ = muon.update(params, muon.init(params))
      >>> bool(jnp.all(jnp.abs(jnp.linalg.svd(direction["a"])[1] / 0.4 - 1) < 0.3))
      True
    """
    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            beta=b1,
            weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: _TRAILING, tree),
        ),
        optax.stateless_with_tree_map(lambda u, _: _RMS * max(u.shape[-2:]) ** 0.5 * u),
    )
    adam = optax.scale_by_adam(b1=_ADAM_B1, b2=b2, eps=eps)
    inner = optax.partition({MATRIX: matrices, LOOKUP: adam, OTHER: adam}, kinds)

    def init(params: Any) -> Any:
        check_matrices("muon", params)
        return inner.init(params)

    return optax.GradientTransformation(init, inner.update)
