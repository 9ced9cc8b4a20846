"""Frozen kernels in 8 or 4 bits a number, in qwix's `QArray`s.

A kernel [..., d_in, d_out] is cut along d_in into tiles of up to 64 rows; every tile of every
column has a scale of its own, [..., tiles, d_out]. Because a scale belongs to rows that are next to
each other, a part of a kernel can be quantized, multiplied and held by a device without the rest.

- "int8": whole numbers from -127 to 127, times the scale.
- "nf4": one of the 16 levels of the 4-bit normal float, times the scale (Dettmers et al., 2023,
  arXiv 2305.14314, appendix E). Accelerators hold two in a byte. JAX on a CPU would take a byte for
  each, and its compiled programs refuse arguments of four bits, so there a byte is what they are.

Numbers are rounded against the scale as it is stored, in the dtype of the kernel, so that rounding
the scale adds no error of its own.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from qwix import QArray

from peft_jax.core.trees import Path, is_stacked
from peft_jax.core.validation import check_choice

FORMATS = ("none", "int8", "nf4")
"""What a frozen kernel can be held as; "none" is an array as it is."""

TILE = 64
"""How many rows of a kernel share a scale at most: 64 as in QLoRA."""

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
_STORED = {"int8": jnp.int8, "nf4": jnp.uint4}
"""What values are held as on accelerators."""

_QTYPE = {"int8": jnp.dtype(jnp.int8), "nf4": "nf4"}
_LARGEST = {"int8": 127.0, "nf4": 1.0}


def is_quantized_leaf(path: Path) -> bool:
    """Whether quantization applies to the leaf at `path`: the blocks' linear maps, and no others.

    Embeddings, the output head, norms and biases stay as they are: they are a small part of a large
    model, and the head's rounding would meet every logit.

    Example:
      >>> is_quantized_leaf(("layers", "mlp", "up_proj", "kernel"))
      True
      >>> is_quantized_leaf(("lm_head", "kernel"))
      False
    """
    return is_stacked(path) and path[-1] == "kernel"


def tile_rows(d_in: int) -> int:
    """How many rows of a kernel of `d_in` rows share a scale: the most up to 64 that divide it.

    Raises:
      ValueError: fewer than 8 would, and scales would take as much room as numbers.

    Example:
      >>> [tile_rows(d_in) for d_in in (4096, 11008, 100, 24)]
      [64, 64, 50, 24]
    """
    tile = next(rows for rows in range(min(TILE, d_in), 0, -1) if d_in % rows == 0)
    if tile < min(_LEAST_TILE, d_in):
        raise ValueError(
            f"a kernel with {d_in} input features cannot be quantized: they do not divide into"
            f" tiles of {_LEAST_TILE} to {TILE}"
        )
    return tile


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape [..., tiles, d_out] of the scales of a kernel [..., d_in, d_out].

    Raises:
      ValueError: as `tile_rows`.
    """
    return (*shape[:-2], shape[-2] // tile_rows(shape[-2]), shape[-1])


def quantize(kernel: Float[Array, "*stack d_in d_out"], quantization: str) -> QArray:
    """A kernel in 8 or 4 bits a number.

    Args:
      kernel: float32 or bfloat16; the scales are held in its dtype.
      quantization: "int8" or "nf4".

    Returns:
      A `QArray` of values [..., d_in, d_out] and scales [..., tiles, d_out], which
      `qwix.dequantize` understands too.

    Raises:
      ValueError: the format is not known, or `tile_rows` refuses d_in.

    Example:
      >>> kernel = jax.random.normal(jax.random.key(0), (128, 32))
      >>> q = quantize(kernel, "int8")
      >>> q.shape, q.scale.shape
      ((128, 32), (2, 32))
      >>> bool(jnp.max(jnp.abs(dequantize(q) - kernel)) <= jnp.max(q.scale) / 2 * 1.001)
      True
    """
    check_choice("quantization", quantization, FORMATS[1:])
    scale = _scales(kernel, _LARGEST[quantization]).astype(kernel.dtype)
    # A tile of zeros: any scale does.
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    parts = kernel.astype(jnp.float32) / _by_row(scale.astype(jnp.float32), kernel.shape[-2])
    if quantization == "int8":
        values = jnp.clip(jnp.round(parts), -127, 127)
    else:
        values = _nearest_level(parts)
    held = storage_dtype(quantization, jax.default_backend())
    return QArray(values.astype(held), scale, None, _QTYPE[quantization])


def storage_dtype(quantization: str, platform: str) -> Any:
    """What the values of a quantized kernel are held as on the devices of a platform."""
    if quantization == "nf4" and platform == "cpu":
        return jnp.uint8
    return _STORED[quantization]


def dequantize(kernel: QArray, dtype: Any = None) -> Float[Array, "*stack d_in d_out"]:
    """The array that a quantized kernel stands for.

    As `qwix.dequantize`, but elementwise throughout: nothing is reshaped that may be cut over
    devices.

    Args:
      kernel: made by `quantize`.
      dtype: of the result, and of the product with the scales; that of the scales by default.
    """
    dtype = kernel.scale.dtype if dtype is None else jnp.dtype(dtype)
    values = _level(kernel.qvalue, dtype) if kernel.qtype == "nf4" else kernel.qvalue.astype(dtype)
    return values * _by_row(kernel.scale.astype(dtype), kernel.shape[-2])


@functools.partial(jax.checkpoint, prevent_cse=True)
def quantized_product(
    x: Float[Array, "*batch d_in"], kernel: QArray
) -> Float[Array, "*batch d_out"]:
    """X W for a quantized W, in the dtype of `x`.

    The backward pass makes W again from its few bits: kept from the forward pass, the dense kernels
    of all layers would be there at once.
    """
    return jnp.matmul(x, dequantize(kernel, x.dtype))


def abstract_quantized(
    kernel: jax.ShapeDtypeStruct, quantization: str, platform: str = ""
) -> QArray:
    """The shapes and dtypes of what `quantize` makes of a kernel.

    Args:
      kernel: the kernel's.
      quantization: "int8" or "nf4".
      platform: of the devices that hold it; by default an accelerator's.

    Raises:
      ValueError: as `quantize`.
    """
    check_choice("quantization", quantization, FORMATS[1:])
    return QArray(
        jax.ShapeDtypeStruct(kernel.shape, storage_dtype(quantization, platform)),
        jax.ShapeDtypeStruct(scale_shape(kernel.shape), kernel.dtype),
        None,
        _QTYPE[quantization],
    )


def quantized_axes(axes: tuple[str | None, ...], quantization: str) -> QArray:
    """The logical axes of the values and the scales of a kernel, given those of the kernel.

    Tiles are rows next to each other, so they are cut over devices as rows are.
    """
    return QArray(axes, axes, None, _QTYPE[quantization])


def format_of(kernel: QArray) -> str:
    """What `quantize` was asked for: "int8" or "nf4".

    Example:
      >>> format_of(quantize(jnp.ones((8, 2)), "int8"))
      'int8'
    """
    return next(name for name, qtype in _QTYPE.items() if kernel.qtype == qtype)


def bytes_of(tree: Any) -> int:
    """The bytes of all numbers of a tree, with two to a byte where they have four bits.

    Example:
      >>> kernel = jax.ShapeDtypeStruct((128, 32), jnp.bfloat16)
      >>> bytes_of(abstract_quantized(kernel, "nf4"))  # 128 * 32 / 2, and 2 * 32 * 2 of scales
      2176
    """

    def one(leaf: Any) -> int:
        bits = 4 if leaf.dtype == jnp.uint4 else 8 * leaf.dtype.itemsize
        return math.ceil(math.prod(leaf.shape) * bits / 8)

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def _scales(kernel: Array, largest: float) -> Array:
    """The largest magnitude of every tile over `largest`, float32 [..., tiles, d_out]."""
    *stack, d_in, d_out = kernel.shape
    rows = tile_rows(d_in)
    tiles = jnp.abs(kernel.astype(jnp.float32)).reshape(*stack, d_in // rows, rows, d_out)
    return jnp.max(tiles, axis=-2) / largest


def _by_row(scale: Array, d_in: int) -> Array:
    """Scales [..., tiles, d_out] repeated for every row of their tiles."""
    return jnp.repeat(scale, d_in // scale.shape[-2], axis=-2)


def _nearest_level(parts: Array) -> Array:
    """The number of the nearest of the 16 levels: how many midpoints between levels lie below."""
    index = jnp.zeros(parts.shape, jnp.int32)
    for low, high in itertools.pairwise(_NF4):
        index += (parts > (low + high) / 2).astype(jnp.int32)
    return index


def _level(index: Array, dtype: Any) -> Array:
    """The level of every index: chosen bit by bit, which vector units do, as they do no look-up."""
    bits = index.astype(jnp.uint8)
    found: list[Array] = [jnp.asarray(level, dtype) for level in _NF4]
    for bit in range(4):
        upper = (bits & jnp.uint8(1 << bit)) != 0
        found = [
            jnp.where(upper, one, zero) for zero, one in zip(found[::2], found[1::2], strict=True)
        ]
    return found[0]
