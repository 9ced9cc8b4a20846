"""The orthogonal and unitary products, one folder a kernel.

- `block_rotation`: activations times a block-diagonal matrix, and the staged butterfly.
- `cayley`: orthogonal blocks from the free entries of skew-symmetric ones, and their composition.
- `unitary`: the unitary product of phases, Fourier transforms and reflections.

Nothing here imports `peft_jax`.
"""
