"""The rotation's GPU kernel, as far as it goes without a GPU: it lowers, and "auto" takes it.

Pallas's GPU interpreter has no predicated copies, which its pipelines make, so no numbers are
checked here; `python -m benchmarks.gpu` checks them on a GPU.
"""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.block_rotation import block_rotation
from kernels_pallas.block_rotation.gpu import _share_out
from kernels_pallas.dispatch import KernelError

BLOCKS = jax.ShapeDtypeStruct((64, 16, 16), jnp.float32)
WIDE = jax.ShapeDtypeStruct((8, 128, 128), jnp.float32)


def lowered(implementation: str, dtype=jnp.bfloat16, blocks=BLOCKS, tokens: int = 200) -> str:
    """Forwards and backwards for a GPU, as text."""
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


def test_auto_takes_both_kernels(said):
    assert lowered("auto").count("custom_call @mosaic_gpu") == 2
    assert len(said) == 2
    assert all(line.endswith("on cuda: pallas, because the default on cuda") for line in said)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": jnp.float32}, "a GPU's matrix instructions would round float32"),
        ({"blocks": jax.ShapeDtypeStruct((8, 48, 48), jnp.float32)}, "blocks of 48 do not fill"),
        ({"blocks": jax.ShapeDtypeStruct((3, 32, 32), jnp.float32)}, "96 features are not a whole"),
    ],
)
def test_what_cannot_work_is_refused(given, message):
    with pytest.raises(KernelError, match=message):
        lowered("pallas", **given)


@pytest.mark.parametrize("tokens", [1, 64, 65, 4096, 8192, 8192 + 640])
def test_tiles_are_shared_out_without_one_left(tokens):
    rows = jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16)
    parts, tiles = _share_out(rows, jax.ShapeDtypeStruct((256, 16, 16), jnp.float32))
    assert parts * tiles == -(-tokens // 64)
