"""Orthogonal blocks from the free entries of skew-symmetric ones, and their composition."""

from kernels_pallas.cayley.api import cayley, compose_butterfly, skew_entries, skew_symmetric

__all__ = ["cayley", "compose_butterfly", "skew_entries", "skew_symmetric"]
