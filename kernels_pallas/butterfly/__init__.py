"""Activations times a product of butterfly factors, and the product as dense blocks."""

from kernels_pallas.butterfly.api import butterfly_rotation
from kernels_pallas.butterfly.factors import compose_butterfly

__all__ = ["butterfly_rotation", "compose_butterfly"]
