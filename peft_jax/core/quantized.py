"""Quantizes frozen kernels to 8 or 4 bits per weight, as qwix `QArray`s.

A kernel [..., d_in, d_out] is divided along d_in into tiles of up to 64 rows. Every tile of every
column has its own scale, [..., tiles, d_out]. Because a scale belongs to adjacent rows, a device
can quantize, hold and multiply by a shard of a kernel without the rest.

- "int8": integers from -127 to 127, times the scale.
- "nf4": one of the 16 levels of the 4-bit normal float, times the scale (Dettmers et al., 2023,
  arXiv 2305.14314, appendix E). Accelerators pack two values into a byte. On a CPU each value takes
  a byte, because compiled CPU programs reject four-bit arguments.
- "w8a8": integers as in "int8", with one scale for all rows of a column. Products run on integers
  (`peft_jax.core.integer_products`), for which activations are rounded too.
- "w8a8g8": the same kernels and forward products as "w8a8". The backward pass also multiplies
  integers, for which gradients of activations are rounded.

Weights are rounded against the scale as stored, in the dtype of the kernel, so that rounding the
scale adds no further error.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from qwix import QArray

from peft_jax.core.trees import Path, is_router, is_stacked
from peft_jax.core.validation import check_choice

FORMATS = ("none", "int8", "nf4", "w8a8", "w8a8g8")
"""Formats of a frozen kernel; "none" is a plain array."""

INTEGER_FORMATS = ("w8a8", "w8a8g8")
"""Formats with one scale per column, whose products run on integers."""

TILE = 64
"""Maximum number of rows that share a scale: 64, as in QLoRA."""

_LEAST_TILE = 8

# The levels of the 4-bit normal float, the quantiles of a normal distribution scaled to [-1, 1].
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_STORED = {"int8": jnp.int8, "nf4": jnp.uint4, "w8a8": jnp.int8, "w8a8g8": jnp.int8}
"""Dtypes of quantized values on accelerators."""

_QTYPE = {"int8": jnp.dtype(jnp.int8), "nf4": "nf4", "w8a8": "w8a8", "w8a8g8": "w8a8g8"}
_LARGEST = {"int8": 127.0, "nf4": 1.0, "w8a8": 127.0, "w8a8g8": 127.0}


def is_quantized_leaf(path: Path) -> bool:
    """Returns whether the leaf at `path` can be quantized: only linear maps of transformer blocks.

    Embeddings, the output head, norms, biases and the routers of experts stay dense. They are a
    small part of a large model. Rounding the head would affect every logit, and rounding a router
    the choice of experts.

    Example:
      >>> is_quantized_leaf(("layers", "mlp", "up_proj", "kernel"))
      True
      >>> is_quantized_leaf(("lm_head", "kernel"))
      False
    """
    return is_stacked(path) and path[-1] == "kernel" and not is_router(path)


def tile_rows(d_in: int, quantization: str) -> int:
    """Returns the number of rows that share a scale.

    It is the largest divisor of `d_in` up to 64; for "w8a8" and "w8a8g8", all rows.

    Raises:
      ValueError: Fewer than 8 rows would share a scale, so that scales would take as much memory
        as weights.

    Example:
      >>> [tile_rows(d_in, "int8") for d_in in (4096, 11008, 100, 24)]
      [64, 64, 50, 24]
      >>> tile_rows(4096, "w8a8")
      4096
    """
    if quantization in INTEGER_FORMATS:
        return d_in
    tile = next(rows for rows in range(min(TILE, d_in), 0, -1) if d_in % rows == 0)
    if tile < min(_LEAST_TILE, d_in):
        raise ValueError(
            f"a kernel with {d_in} input features cannot be quantized: {d_in} has no divisor from"
            f" {_LEAST_TILE} to {TILE}"
        )
    return tile


def scale_shape(shape: tuple[int, ...], quantization: str) -> tuple[int, ...]:
    """Returns the scales' shape [..., tiles, d_out] for a kernel [..., d_in, d_out].

    Raises:
      ValueError: `tile_rows` rejects d_in.
    """
    return (*shape[:-2], shape[-2] // tile_rows(shape[-2], quantization), shape[-1])


def quantize(kernel: Float[Array, "*stack d_in d_out"], quantization: str) -> QArray:
    """Quantizes a kernel to 8 or 4 bits per weight.

    Args:
      kernel: Kernel [..., d_in, d_out], float32 or bfloat16. The scales have its dtype.
      quantization: One of `FORMATS` but "none".

    Returns:
      A `QArray` of values [..., d_in, d_out] and scales [..., tiles, d_out]. `qwix.dequantize`
      reads it too.

    Raises:
      ValueError: The format is not known, or `tile_rows` rejects d_in.

    Example:
      >>> kernel = jax.random.normal(jax.random.key(0), (128, 32))
      >>> q = quantize(kernel, "int8")
      >>> q.shape, q.scale.shape
      ((128, 32), (2, 32))
      >>> bool(jnp.max(jnp.abs(dequantize(q) - kernel)) <= jnp.max(q.scale) / 2 * 1.001)
      True
    """
    _check_format(kernel.shape, quantization)
    scale = _scales(kernel, quantization).astype(kernel.dtype)
    # A tile of zeros works with any scale but zero, by which it would be divided.
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    parts = kernel.astype(jnp.float32) / _by_row(scale.astype(jnp.float32), kernel.shape[-2])
    if quantization == "nf4":
        values = _nearest_level(parts)
    else:
        values = jnp.clip(jnp.round(parts), -127, 127)
    held = storage_dtype(quantization, jax.default_backend())
    return QArray(values.astype(held), scale, None, _QTYPE[quantization])


def storage_dtype(quantization: str, platform: str) -> Any:
    """Returns the dtype of quantized values on a platform's devices."""
    if quantization == "nf4" and platform == "cpu":
        return jnp.uint8
    return _STORED[quantization]


def dequantize(kernel: QArray, dtype: Any = None) -> Float[Array, "*stack d_in d_out"]:
    """Returns a quantized kernel as a dense array [..., d_in, d_out].

    Unlike `qwix.dequantize`, it is elementwise throughout, so that no sharded axis is reshaped.

    Args:
      kernel: Kernel that `quantize` returned.
      dtype: Dtype of the result and of the product with the scales. Default: dtype of the scales.
    """
    dtype = kernel.scale.dtype if dtype is None else jnp.dtype(dtype)
    values = _level(kernel.qvalue, dtype) if kernel.qtype == "nf4" else kernel.qvalue.astype(dtype)
    return values * _by_row(kernel.scale.astype(dtype), kernel.shape[-2])


@functools.partial(jax.checkpoint, prevent_cse=True)
def quantized_product(
    x: Float[Array, "*batch d_in"], kernel: QArray
) -> Float[Array, "*batch d_out"]:
    """Returns x W for a quantized W, in the dtype of `x`.

    The backward pass dequantizes W again. Otherwise the dense kernels of all layers would be saved
    from the forward pass and be in memory at once.
    """
    return jnp.matmul(x, dequantize(kernel, x.dtype))


def abstract_quantized(
    kernel: jax.ShapeDtypeStruct, quantization: str, platform: str = ""
) -> QArray:
    """Returns the shapes and dtypes of a quantized kernel.

    Args:
      kernel: Shape and dtype of the dense kernel.
      quantization: One of `FORMATS` but "none".
      platform: Platform of the devices that hold the kernel. Default: an accelerator.

    Raises:
      ValueError: `quantize` would reject the kernel.
    """
    _check_format(kernel.shape, quantization)
    return QArray(
        jax.ShapeDtypeStruct(kernel.shape, storage_dtype(quantization, platform)),
        jax.ShapeDtypeStruct(scale_shape(kernel.shape, quantization), kernel.dtype),
        None,
        _QTYPE[quantization],
    )


def quantized_axes(axes: tuple[str | None, ...], quantization: str) -> QArray:
    """Returns the logical axes of a quantized kernel's values and scales.

    A tile is a group of adjacent rows, so tiles are sharded as rows are. One scale for all rows is
    not sharded along them.

    Args:
      axes: Logical axes of the dense kernel.
      quantization: One of `FORMATS` but "none".
    """
    by_column = quantization in INTEGER_FORMATS
    of_scales = (*axes[:-2], None, axes[-1]) if by_column else axes
    return QArray(axes, of_scales, None, _QTYPE[quantization])


def format_of(kernel: QArray) -> str:
    """Returns the format of a quantized kernel, such as "int8".

    Example:
      >>> format_of(quantize(jnp.ones((8, 2)), "int8"))
      'int8'
    """
    return next(name for name, qtype in _QTYPE.items() if kernel.qtype == qtype)


def forward_format(quantization: str) -> str:
    """Returns the format that computes the same function, without regard to gradients.

    Example:
      >>> forward_format("w8a8g8"), forward_format("nf4")
      ('w8a8', 'nf4')
    """
    return "w8a8" if quantization == "w8a8g8" else quantization


def bytes_of(tree: Any) -> int:
    """Returns the number of bytes of a tree's arrays; two four-bit values share a byte.

    Example:
      >>> kernel = jax.ShapeDtypeStruct((128, 32), jnp.bfloat16)
      >>> bytes_of(abstract_quantized(kernel, "nf4"))  # 128 * 32 / 2, and 2 * 32 * 2 of scales
      2176
    """

    def one(leaf: Any) -> int:
        bits = 4 if leaf.dtype == jnp.uint4 else 8 * leaf.dtype.itemsize
        return math.ceil(math.prod(leaf.shape) * bits / 8)

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def _check_format(shape: tuple[int, ...], quantization: str) -> None:
    check_choice("quantization", quantization, FORMATS[1:])
    if quantization in INTEGER_FORMATS and len(shape) > 3:
        raise ValueError(
            f"kernels of experts cannot be quantized as {quantization}, because their products have"
            " no integer form; use int8 or nf4"
        )


def _scales(kernel: Array, quantization: str) -> Array:
    """Returns scales, float32 [..., tiles, d_out], with which values fill the format's range."""
    *stack, d_in, d_out = kernel.shape
    rows = tile_rows(d_in, quantization)
    tiles = jnp.abs(kernel.astype(jnp.float32)).reshape(*stack, d_in // rows, rows, d_out)
    return jnp.max(tiles, axis=-2) / _LARGEST[quantization]


def _by_row(scale: Array, d_in: int) -> Array:
    """Repeats scales [..., tiles, d_out] for every row of their tiles."""
    return jnp.repeat(scale, d_in // scale.shape[-2], axis=-2)


def _nearest_level(parts: Array) -> Array:
    """Returns the index of the nearest level, by counting the midpoints below each value."""
    index = jnp.zeros(parts.shape, jnp.int32)
    for low, high in itertools.pairwise(_NF4):
        index += (parts > (low + high) / 2).astype(jnp.int32)
    return index


def _level(index: Array, dtype: Any) -> Array:
    """Returns the level of every index.

    Levels are selected bit by bit, because vector units have no table look-up.
    """
    bits = index.astype(jnp.uint8)
    found: list[Array] = [jnp.asarray(level, dtype) for level in _NF4]
    for bit in range(4):
        upper = (bits & jnp.uint8(1 << bit)) != 0
        found = [
            jnp.where(upper, one, zero) for zero, one in zip(found[::2], found[1::2], strict=True)
        ]
    return found[0]
