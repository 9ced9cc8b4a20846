"""Activations times a block-diagonal matrix, and a product of butterfly factors."""

from kernels_pallas.block_rotation.api import block_rotation, butterfly_rotation

__all__ = ["block_rotation", "butterfly_rotation"]
