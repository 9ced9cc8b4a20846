"""Block rotation: multiplies activations by a block-diagonal matrix."""

from kernels_pallas.block_rotation.api import block_rotation
from kernels_pallas.block_rotation.rotated_kernel import (
    prefer_rotated_kernel,
    rotated_kernel_product,
)

__all__ = ["block_rotation", "prefer_rotated_kernel", "rotated_kernel_product"]
