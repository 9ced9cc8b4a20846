"""Block rotation: multiplies activations by a block-diagonal matrix."""

from kernels_pallas.block_rotation.api import block_rotation
from kernels_pallas.block_rotation.rotated_kernel import (
    block_overlaps,
    is_partitioned,
    prefer_rotated_kernel,
    rotate_kernel,
    rotated_kernel_product,
)

__all__ = [
    "block_overlaps",
    "block_rotation",
    "is_partitioned",
    "prefer_rotated_kernel",
    "rotate_kernel",
    "rotated_kernel_product",
]
