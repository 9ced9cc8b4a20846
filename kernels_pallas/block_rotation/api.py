"""The block rotation's public function."""

import jax
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import vjp, xla
from kernels_pallas.checks import check_real, check_width
from kernels_pallas.dispatch import report_xla, resolve
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
      blocks: [n, B, B]; cast to the dtype of `x`. Their gradient is summed over tokens in float32
        (and, with "xla", then rounded to that dtype).
      precision: of the product; the platform's default, which on accelerators may round float32
        inputs to fewer bits, unless given.
      implementation: one of `kernels_pallas.dispatch.IMPLEMENTATIONS`; by default what
        `kernels_pallas.dispatch.using` says, or "auto". "xla" can be differentiated any number of
        times and forwards, the others once and backwards.

    Returns:
      [..., d] in the dtype of `x`.

    Raises:
      TypeError: when the arrays are no real floating-point numbers.
      ValueError: when the blocks are not [n, B, B], or d is not n B.
      KernelError: the implementation asked for cannot work where this is lowered.
    """
    check_real(x=x, blocks=blocks)
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        raise ValueError(f"blocks must be [n, B, B], but are {list(blocks.shape)}")
    n, block_size, _ = blocks.shape
    check_width(x.shape[-1], n * block_size)
    chosen = resolve(implementation)
    if chosen == "xla":
        report_xla("block_rotation", x, blocks)
        return xla.forward(x, blocks, precision=precision)[0]
    return spread(
        lambda x, blocks: vjp.rotate(x, blocks, precision, chosen),
        x,
        blocks,
        blocks=n,
        feature_axes=(0,),
        implementation=chosen,
    )
