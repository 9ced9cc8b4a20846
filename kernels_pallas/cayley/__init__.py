"""The Cayley transform: orthogonal blocks from the free entries of skew-symmetric matrices."""

from kernels_pallas.cayley.api import cayley, skew_entries, skew_symmetric

__all__ = ["cayley", "skew_entries", "skew_symmetric"]
