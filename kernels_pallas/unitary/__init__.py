"""The unitary product: activations times phases, Fourier transforms and reflections."""

from kernels_pallas.unitary.api import unitary_product

__all__ = ["unitary_product"]
