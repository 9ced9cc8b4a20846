"""The block rotation's GPU kernel without a GPU: that it lowers, and that "auto" chooses it.

No numbers are checked here, because Pallas's GPU interpreter lacks the predicated copies that its
own pipelines make. `python -m benchmarks.gpu` checks them on a GPU.
"""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.block_rotation.gpu import _split_tokens
from kernels_pallas.dispatch import KernelError

BLOCKS = jax.ShapeDtypeStruct((64, 16, 16), jnp.float32)
WIDE = jax.ShapeDtypeStruct((8, 128, 128), jnp.float32)


def lowered(implementation: str, dtype=jnp.bfloat16, blocks=BLOCKS, tokens: int = 200) -> str:
    """Lowers the product and its gradients for a GPU and returns the text."""
    n, size, _ = blocks.shape
    x = jax.ShapeDtypeStruct((tokens, n * size), dtype)

    def both(x, blocks):
        y, transpose = jax.vjp(
            lambda *a: block_rotation(*a, implementation=implementation), x, blocks
        )
        return y, transpose(y)

    return jax.jit(both).trace(x, blocks).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [1, 8, 65, 201, 4096])
@pytest.mark.parametrize("blocks", [BLOCKS, WIDE], ids=["16", "128"])
def test_both_kernels_lower(tokens, blocks):
    text = lowered("pallas", blocks=blocks, tokens=tokens)
    assert text.count("custom_call @mosaic_gpu") == 2


def test_auto_chooses_both_kernels(kernel_log):
    assert lowered("auto").count("custom_call @mosaic_gpu") == 2
    assert len(kernel_log) == 2
    assert all("on cuda: pallas" in line for line in kernel_log)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": jnp.float32}, "x is float32"),
        ({"blocks": jax.ShapeDtypeStruct((8, 48, 48), jnp.float32)}, "blocks of 48"),
        ({"blocks": jax.ShapeDtypeStruct((3, 32, 32), jnp.float32)}, "96 features"),
    ],
)
def test_rejects_unsupported_operands(given, message):
    with pytest.raises(KernelError, match=message):
        lowered("pallas", **given)


@pytest.mark.parametrize("tokens", [1, 64, 65, 4096, 8192, 8192 + 640])
def test_every_tile_belongs_to_one_part(tokens):
    rows = jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16)
    parts, tiles = _split_tokens(rows, jax.ShapeDtypeStruct((256, 16, 16), jnp.float32))
    assert parts * tiles == -(-tokens // 64)
