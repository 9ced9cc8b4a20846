"""Activations times a product of butterfly factors that is too large to be made one matrix."""

from kernels_pallas.butterfly.api import butterfly_rotation

__all__ = ["butterfly_rotation"]
