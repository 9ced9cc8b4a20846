"""The block rotation's public functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import vjp, xla
from kernels_pallas.dispatch import resolve
from kernels_pallas.layout import spread


def block_rotation(
    x: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d"]:
    """Row vectors times a block-diagonal matrix, y = x blockdiag(blocks).

    Args:
      x: activations [..., d] with d = n B.
      blocks: [n, B, B]; cast to the dtype of `x`. Their gradient is summed over tokens in float32.
      precision: of the product; the platform's default, which on accelerators may round float32
        inputs to fewer bits, unless given.
      implementation: one of `kernels_pallas.dispatch.IMPLEMENTATIONS`; by default what
        `kernels_pallas.dispatch.using` says, or "auto". "xla" can be differentiated any number of
        times and forwards, the others once and backwards.

    Returns:
      [..., d] in the dtype of `x`.

    Raises:
      ValueError: when d is not n B.
      KernelError: the implementation asked for cannot work where this is lowered.
    """
    n, block_size, _ = blocks.shape
    _check_width(x.shape[-1], n * block_size)
    chosen = resolve(implementation)
    if chosen == "xla":
        return xla.forward(x, blocks, precision=precision)[0]
    return spread(
        lambda x, blocks: vjp.rotate(x, blocks, precision, chosen),
        x,
        blocks,
        blocks=n,
        feature_axes=(0,),
        implementation=chosen,
    )


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
      factors: [m, n, b, b]; b is even when m > 1.
      precision: of the products, as for `block_rotation`.
      implementation: as for `block_rotation`.

    Returns:
      [..., d] in the dtype of `x`.

    Raises:
      ValueError: when d is not n b.
      KernelError: as for `block_rotation`.
    """
    m, n, block_size, _ = factors.shape
    _check_width(x.shape[-1], n * block_size)
    if m == 1:
        return block_rotation(x, factors[0], precision=precision, implementation=implementation)
    for level in reversed(range(m)):
        stride = 2**level
        halves = x.reshape(*x.shape[:-1], n // stride, 2, stride, block_size // 2)
        paired = jnp.swapaxes(halves, -3, -2)
        rotated = block_rotation(
            paired.reshape(x.shape),
            factors[level],
            precision=precision,
            implementation=implementation,
        )
        x = jnp.swapaxes(rotated.reshape(paired.shape), -3, -2).reshape(x.shape)
    return x


def _check_width(given: int, blocks: int) -> None:
    if given != blocks:
        raise ValueError(f"the blocks cover {blocks} features, but the activations have {given}")
