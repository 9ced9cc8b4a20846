"""The orthogonal and unitary products, one folder a kernel.

- `block_rotation`: activations times a block-diagonal matrix.
- `butterfly`: activations times a product of butterfly factors, and that product as dense blocks.
- `cayley`: orthogonal blocks from the free entries of skew-symmetric matrices.
- `unitary`: the unitary product of phases, Fourier transforms and reflections.

Beside them, what they share:

- `dispatch`: which implementation runs (XLA, Pallas, or Pallas interpreted), and why.
- `layout`: how activations lie on a mesh, so that a kernel runs on each device's part.
- `chips`: the memory on the chip that a kernel may fill.
- `tpu_compiler`: the real TPU compiler on a machine without a TPU.

Nothing here imports `peft_jax`.
"""
