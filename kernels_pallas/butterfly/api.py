"""Offers the butterfly product, and checks which operands its kernels support."""

import jax
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import config as block_rotation_config
from kernels_pallas.block_rotation.api import block_rotation
from kernels_pallas.butterfly import config, stages, xla
from kernels_pallas.butterfly.factors import check_factors
from kernels_pallas.operand_checks import check_real, check_width
from kernels_pallas.product import Product
from kernels_pallas.target_device import target_vmem_bytes, unsupported_tpu_dtype


def butterfly_rotation(
    x: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    *,
    precision: jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d"]:
    """Multiplies row vectors by a product of butterfly factors, y = x F_{m-1} ... F_0.

    Factor i is block-diagonal after a permutation that pairs half-block h with half-block h + 2^i
    (BOFT, arXiv 2311.06243, section 4): F_i = P_i blockdiag(factors[i]) P_iᵀ with P_0 = I.

    Args:
      x: Activations [..., d] with d = n b, and n a multiple of 2^(m-1).
      factors: [m, n, b, b], cast to the dtype of `x`; b is even when m > 1.
      precision: As for `kernels_pallas.block_rotation.block_rotation`.
      implementation: As for `kernels_pallas.block_rotation.block_rotation`.

    Returns:
      [..., d] in the dtype of `x`.

    Raises:
      TypeError: An array is not real floating-point.
      ValueError: The factors are not [m, n, b, b] as above, or d is not n b.
      KernelError: While lowering, if the requested implementation cannot run.
    """
    check_real(x=x, factors=factors)
    check_factors(factors)
    m, n, block_size, _ = factors.shape
    check_width(x.shape[-1], n * block_size)
    if m == 1:
        return block_rotation(x, factors[0], precision=precision, implementation=implementation)
    return _PRODUCT(
        x,
        factors,
        blocks=n // 2 ** (m - 1),
        precision=precision,
        implementation=implementation,
    )


def _unsupported(
    platform: str,
    x: jax.ShapeDtypeStruct,
    factors: jax.ShapeDtypeStruct,
    *,
    backward: bool,
    precision: jax.lax.Precision | None,
) -> str | None:
    del platform, precision  # there are kernels for TPUs alone
    m, _, block_size, _ = factors.shape
    try:
        if stages.composes(factors):
            block_rotation_config.choose_config(
                tokens=1,
                features=x.shape[-1],
                block_size=block_size * 2 ** (m - 1),
                dtype=x.dtype,
                backward=backward,
            )
        else:
            config.choose_tokens(
                stages.split(block_size, m),
                16,
                x.dtype,
                backward=backward,
                vmem=target_vmem_bytes(),
            )
    except ValueError as error:
        return str(error)
    return unsupported_tpu_dtype(x.dtype)


_PRODUCT = Product(
    name="butterfly_rotation",
    xla=xla,
    tpu="kernels_pallas.butterfly.tpu",
    unsupported=_unsupported,
    feature_axes=(1,),
)
