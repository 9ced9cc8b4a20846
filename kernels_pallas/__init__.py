"""Computes orthogonal and unitary products, one folder per operation.

- `block_rotation`: activations times a block-diagonal matrix.
- `butterfly`: activations times a product of butterfly factors, and that product as dense blocks.
- `cayley`: orthogonal blocks from the free entries of skew-symmetric matrices.
- `unitary`: activations times a product of phases, Fourier transforms and reflections.

They share these modules:

- `dispatch`: chooses which implementation runs (XLA, Pallas, or Pallas interpreted).
- `product`: makes an operation's implementations one differentiable function.
- `layout`: how activations are sharded, so that each device runs a kernel on its own shard.
- `operand_checks`: checks of what callers pass.
- `target_device`: platform, vector memory and GPU generation that a program is compiled for.
- `tpu_compiler`: the TPU compiler on a machine without a TPU.
- `memory_traffic`: what a compiled kernel moves, beside its lower bound.
- `shared_cases`: model widths and tolerances for tests and benchmarks.
- `renamed`: old names of modules.

Nothing here imports `peft_jax`.
"""

from kernels_pallas import renamed

renamed.install()
