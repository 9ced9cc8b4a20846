"""Activations times a block-diagonal matrix."""

from kernels_pallas.block_rotation.api import block_rotation

__all__ = ["block_rotation"]
