"""Activations times a block-diagonal matrix."""

from kernels_pallas.block_rotation.api import block_rotation
from kernels_pallas.block_rotation.product import turned_kernel_product, turning_the_kernel_pays

__all__ = ["block_rotation", "turned_kernel_product", "turning_the_kernel_pays"]
