"""Offers the block rotation, and checks which operands its kernels support."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import config, xla
from kernels_pallas.operand_checks import check_real, check_width
from kernels_pallas.product import Product
from kernels_pallas.target_device import unsupported_gpu, unsupported_tpu_dtype


def block_rotation(
    x: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch d"]:
    """Multiplies row vectors by a block-diagonal matrix, y = x blockdiag(blocks).

    Args:
      x: Activations [..., d] with d = n B.
      blocks: [n, B, B], cast to the dtype of `x`. Their gradient is summed over tokens in float32;
        "xla" then rounds it to that dtype.
      precision: Precision of the product. The platform's default may round float32 inputs to fewer
        bits on accelerators.
      implementation: One of `kernels_pallas.dispatch.IMPLEMENTATIONS`, or None for the default
        (`kernels_pallas.dispatch.use_implementation`). "xla" can be differentiated any number of
        times, in both modes. The others can be differentiated once, in reverse mode.

    Returns:
      [..., d] in the dtype of `x`.

    Raises:
      TypeError: An array is not real floating-point.
      ValueError: The blocks are not [n, B, B], or d is not n B.
      KernelError: While lowering, if the requested implementation cannot run.
    """
    check_real(x=x, blocks=blocks)
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        raise ValueError(f"blocks have shape {list(blocks.shape)} but must be [n, B, B]")
    n, block_size, _ = blocks.shape
    check_width(x.shape[-1], n * block_size)
    return _PRODUCT(x, blocks, blocks=n, precision=precision, implementation=implementation)


def _unsupported(
    platform: str,
    x: jax.ShapeDtypeStruct,
    blocks: jax.ShapeDtypeStruct,
    *,
    backward: bool,
    precision: jax.lax.Precision | None,
) -> str | None:
    del precision
    block_size = blocks.shape[-1]
    try:
        if platform == "gpu":
            return _unsupported_on_gpu(x, config.gpu_matrix_size(block_size))
        config.choose_config(
            tokens=1,
            features=x.shape[-1],
            block_size=block_size,
            dtype=x.dtype,
            backward=backward,
        )
    except ValueError as error:
        return str(error)
    return unsupported_tpu_dtype(x.dtype)


def _unsupported_on_gpu(x: jax.ShapeDtypeStruct, matrix: int) -> str | None:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype.name}, which a GPU's matrix instructions would round"
    if x.shape[-1] % matrix:
        return f"x has {x.shape[-1]} features, which must be a multiple of {matrix}"
    return unsupported_gpu()


_PRODUCT = Product(
    name="block_rotation",
    xla=xla,
    tpu="kernels_pallas.block_rotation.tpu",
    gpu="kernels_pallas.block_rotation.gpu",
    unsupported=_unsupported,
    feature_axes=(0,),
)
