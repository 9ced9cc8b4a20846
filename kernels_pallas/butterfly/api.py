"""The butterfly's public function."""

import jax
from jaxtyping import Array, Float

from kernels_pallas.block_rotation.api import block_rotation
from kernels_pallas.butterfly import vjp, xla
from kernels_pallas.butterfly.factors import check_factors
from kernels_pallas.checks import check_real, check_width
from kernels_pallas.dispatch import report_xla, resolve
from kernels_pallas.layout import spread


def butterfly_rotation(
    x: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    *,
    precision: jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d"]:
    """Row vectors times a product of butterfly factors, y = x F_{m-1} ... F_0.

    Factor i is block-diagonal after a permutation that pairs half-block h with half-block h + 2^i
    (BOFT, arXiv 2311.06243, section 4): F_i = P_i blockdiag(factors[i]) P_iᵀ with P_0 = I.

    Args:
      x: activations [..., d] with d = n b, and n a multiple of 2^(m-1).
      factors: [m, n, b, b]; b is even when m > 1. Cast to the dtype of `x`.
      precision: of the products, as for `block_rotation`.
      implementation: as for `block_rotation`.

    Returns:
      [..., d] in the dtype of `x`.

    Raises:
      TypeError: as for `block_rotation`.
      ValueError: when the factors are not as described, or d is not n b.
      KernelError: as for `block_rotation`.
    """
    check_real(x=x, factors=factors)
    check_factors(factors)
    m, n, block_size, _ = factors.shape
    check_width(x.shape[-1], n * block_size)
    if m == 1:
        return block_rotation(x, factors[0], precision=precision, implementation=implementation)
    chosen = resolve(implementation)
    if chosen == "xla":
        report_xla("butterfly_rotation", x, factors)
        return xla.forward(x, factors, precision=precision)[0]
    return spread(
        lambda x, factors: vjp.rotate(x, factors, precision, chosen),
        x,
        factors,
        blocks=n // 2 ** (m - 1),
        feature_axes=(1,),
        implementation=chosen,
    )
