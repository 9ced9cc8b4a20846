"""Rotates blocks on NVIDIA GPUs of the Hopper generation, written with Pallas's Mosaic GPU.

It uses Mosaic GPU because Pallas's Triton back end is deprecated from JAX 0.11. It needs Hopper
because Hopper's matrix instructions (wgmma) take both factors from shared memory. Earlier
generations lack them and the next generation has others; XLA's form runs there.

A thread block rotates the features of one matrix. It loads the matrix once and streams tiles of
tokens through shared memory, loading some while it multiplies others. Several thread blocks share
the tokens, so that there are enough for the whole GPU, and the gradient of a matrix is then summed
over them. A tile reads zeros past the last token and does not write there. Only whole groups of
eight tokens can be moved, so other arrays are copied once with zeros appended.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.block_rotation.config import GPU_TOKENS, gpu_concurrent_steps, gpu_matrix_size
from kernels_pallas.block_rotation.matrices import from_matrices, to_matrices

GROUP = 8
"""Number of tokens that the matrix instructions read together from shared memory."""

THREAD_BLOCKS = 2 * 132
"""Least number of thread blocks if the tokens suffice: two per multiprocessor of an H100."""


def forward(
    x: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None,
    interpret: Any = None,
) -> tuple[Float[Array, "*batch d"]]:
    """Returns (y,) with y = x blockdiag(blocks).

    Args:
      x: Activations, bfloat16 or float16.
      blocks: [n, B, B].
      precision: Ignored, because products of 16-bit numbers are exact in float32.
      interpret: Argument of `plgpu.kernel`.
    """
    del precision
    if not x.size:
        return (x,)
    rows = _whole_groups(x)
    size, (parts, tiles) = gpu_matrix_size(blocks.shape[-1]), _split_tokens(rows, blocks)
    tile = _tile(size, x.dtype)

    def body(x_gmem: Any, matrices_gmem: Any, y_gmem: Any, matrix_smem: Any, arrived: Any) -> None:
        feature, part = jax.lax.axis_index("feature"), jax.lax.axis_index("part")
        _load(matrices_gmem.at[feature], matrix_smem, arrived)

        def step(_: Any, x_smem: Any, y_smem: Any) -> None:
            y_smem[...] = _product(x_smem, matrix_smem).astype(y_smem.dtype)

        here = _at(part, tiles, feature)
        plgpu.emit_pipeline(
            step,
            grid=(tiles,),
            in_specs=[plgpu.BlockSpec(index_map=here, **tile)],
            out_specs=[plgpu.BlockSpec(index_map=here, **tile)],
            max_concurrent_steps=gpu_concurrent_steps(size, backward=False),
        )(x_gmem, y_gmem)

    run = _kernel(
        body,
        out_type=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        scratch_types=[_matrix(size, x.dtype), plgpu.Barrier()],
        grid=(rows.shape[1] // size, parts),
        interpret=interpret,
    )
    y = run(rows, to_matrices(blocks, size, rows.shape[1], x.dtype))
    return (_as_given(y, x),)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None,
    interpret: Any = None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "n B B"]]:
    """Returns (dx, dblocks) for the gradient g of y, in one pass; arguments as for `forward`."""
    del precision
    if not x.size:
        return x, jnp.zeros_like(blocks)
    rows = _whole_groups(x)
    size, (parts, tiles) = gpu_matrix_size(blocks.shape[-1]), _split_tokens(rows, blocks)
    tile = _tile(size, x.dtype)

    def body(
        x_gmem: Any,
        g_gmem: Any,
        matrices_gmem: Any,
        dx_gmem: Any,
        dmatrices_gmem: Any,
        matrix_smem: Any,
        dmatrix_smem: Any,
        arrived: Any,
    ) -> None:
        feature, part = jax.lax.axis_index("feature"), jax.lax.axis_index("part")
        _load(matrices_gmem.at[feature], matrix_smem, arrived)

        def sum_over_tokens(dmatrix: Any) -> jax.Array:
            def step(_: Any, x_smem: Any, g_smem: Any, dx_smem: Any) -> None:
                plgpu.wgmma(dmatrix, plgpu.transpose_ref(x_smem, (1, 0)), g_smem)
                dx = _product(g_smem, plgpu.transpose_ref(matrix_smem, (1, 0)))
                dx_smem[...] = dx.astype(dx_smem.dtype)

            here = _at(part, tiles, feature)
            plgpu.emit_pipeline(
                step,
                grid=(tiles,),
                in_specs=[plgpu.BlockSpec(index_map=here, **tile) for _ in range(2)],
                out_specs=[plgpu.BlockSpec(index_map=here, **tile)],
                max_concurrent_steps=gpu_concurrent_steps(size, backward=True),
            )(x_gmem, g_gmem, dx_gmem)
            return dmatrix[...]

        dmatrix_smem[...] = pl.run_scoped(sum_over_tokens, plgpu.ACC((size, size), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dmatrix_smem, dmatrices_gmem.at[part, feature])
        plgpu.wait_smem_to_gmem(0)

    features = rows.shape[1] // size
    run = _kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            jax.ShapeDtypeStruct((parts, features, size, size), jnp.float32),
        ],
        scratch_types=[
            _matrix(size, x.dtype),
            plgpu.SMEM((size, size), jnp.float32),
            plgpu.Barrier(),
        ],
        grid=(features, parts),
        interpret=interpret,
    )
    matrices = to_matrices(blocks, size, rows.shape[1], x.dtype)
    dx, dmatrices = run(rows, _whole_groups(g), matrices)
    n, size, _ = blocks.shape
    dblocks = from_matrices(jnp.sum(dmatrices, axis=0), (n, size, size))
    return _as_given(dx, x), dblocks.astype(blocks.dtype)


def _whole_groups(x: Float[Array, "*batch d"]) -> Float[Array, "tokens d"]:
    """Merges all axes of tokens and pads them with zeros to whole groups."""
    rows = x.reshape(-1, x.shape[-1])
    missing = -rows.shape[0] % GROUP
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _as_given(rows: Float[Array, "tokens d"], x: jax.Array) -> jax.Array:
    """Reshapes the rows of a result to the shape of the activations `x`."""
    return rows[: x.size // x.shape[-1]].reshape(x.shape)


def _product(a_smem: Any, b_smem: Any) -> jax.Array:
    """Returns the float32 product of two matrices in shared memory."""

    def multiply(product: Any) -> jax.Array:
        plgpu.wgmma(product, a_smem, b_smem)
        return product[...]  # reading waits for the product

    shape = (a_smem.shape[0], b_smem.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _load(source: Any, target: Any, arrived: Any) -> None:
    plgpu.copy_gmem_to_smem(source, target, arrived)
    plgpu.barrier_wait(arrived)


def _at(part: Any, tiles: int, feature: Any) -> Any:
    """Returns the index map of a part's tiles, in units of tiles."""
    return lambda tile: (part * tiles + tile, feature)


def _split_tokens(rows: Any, blocks: Any) -> tuple[int, int]:
    """Returns the number of parts that share the tiles of tokens, and the tiles of each part."""
    features = rows.shape[1] // gpu_matrix_size(blocks.shape[-1])
    tiles = pl.cdiv(rows.shape[0], GPU_TOKENS)
    wanted = pl.cdiv(THREAD_BLOCKS, features)
    parts = next(n for n in range(min(wanted, tiles), 0, -1) if tiles % n == 0)
    return parts, tiles // parts


def _transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Returns the layout of a matrix in shared memory that matrix instructions can read."""
    width = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * width * 8)
    return plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle)


def _tile(size: int, dtype: Any) -> dict[str, Any]:
    return {"block_shape": (GPU_TOKENS, size), "transforms": _transforms(size, dtype)}


def _matrix(size: int, dtype: Any) -> Any:
    return plgpu.SMEM((size, size), dtype, transforms=_transforms(size, dtype))


def _kernel(body: Any, *, grid: tuple[int, int], interpret: Any, **settings: Any) -> Any:
    return functools.partial(plgpu.kernel, interpret=interpret)(
        body,
        grid=grid,
        grid_names=("feature", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **settings,
    )
