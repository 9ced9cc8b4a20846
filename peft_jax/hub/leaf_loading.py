"""Loads leaves onto their devices, optionally quantizing them on the way.

Every device's shard is read separately, so a process reads and holds its own shards only.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from qwix import QArray

from peft_jax.core import format_of, quantize, storage_dtype
from peft_jax.hub.leaf_sources import LeafSource, Ranges

_ALIGNMENT = 64

_PIECE = 64 * 2**20
"""Number of bytes quantized at once, approximately."""


def load_leaf(leaf: Any, sharding: Any, source: LeafSource) -> Any:
    """Loads a leaf onto its devices.

    Args:
      leaf: Shape and dtype as a `jax.ShapeDtypeStruct`, or a `QArray` of them to quantize.
      sharding: Sharding of the array; for a `QArray`, a `QArray` of shardings.
      source: Source of the values.

    Returns:
      An array, or a `QArray` of arrays.
    """
    if isinstance(leaf, QArray):
        return _place_quantized(leaf, sharding, source)
    return jax.make_array_from_callback(leaf.shape, sharding, _reader(leaf, source))


def _reader(leaf: jax.ShapeDtypeStruct, source: LeafSource) -> Callable[[Any], np.ndarray]:
    """Returns a function that reads the shard at a tuple of slices.

    A shard that several devices hold is read once.
    """

    @functools.cache
    def read(ranges: Ranges) -> np.ndarray:
        return _read(source, ranges, leaf.dtype)

    return lambda index: read(_ranges(index, leaf.shape))


def _place_quantized(leaf: QArray, sharding: QArray, source: LeafSource) -> QArray:
    """Loads a quantized leaf; every device quantizes its own shard in pieces."""
    values_at = _device_ranges(leaf.qvalue, sharding.qvalue)
    scales_at = _device_ranges(leaf.scale, sharding.scale)
    made: dict[tuple[Ranges, Ranges], tuple[jax.Array, jax.Array]] = {}
    held: list[tuple[jax.Array, jax.Array]] = []
    for device, values in values_at.items():
        part = values, scales_at[device]
        if part not in made:
            # A run may have set a mesh; only this device must compute.
            with jax.set_mesh(jax.sharding.Mesh([device], ("device",))):
                made[part] = _quantize_part(leaf, *part, source, device)
        held.append(jax.device_put(made[part], device))
    arrays = [
        jax.make_array_from_single_device_arrays(array.shape, layout, [parts[at] for parts in held])
        for at, (array, layout) in enumerate(
            ((leaf.qvalue, sharding.qvalue), (leaf.scale, sharding.scale))
        )
    ]
    return QArray(*arrays, None, leaf.qtype)


def _quantize_part(
    leaf: QArray, values: Ranges, scales: Ranges, source: LeafSource, device: jax.Device
) -> tuple[jax.Array, jax.Array]:
    """Returns one device's shard of the values and of the scales.

    A tile that extends beyond the shard is read whole, since its scale depends on all of it.
    """
    tile = leaf.shape[-2] // leaf.scale.shape[-2]
    *stack, rows, columns = values
    tiles = scales[-2]
    dtype = leaf.scale.dtype
    at_once = max(1, _PIECE // (tile * (columns[1] - columns[0]) * dtype.itemsize))
    held = (
        jnp.zeros(_shape(values), storage_dtype(format_of(leaf), device.platform), device=device),
        jnp.zeros(_shape(scales), dtype, device=device),
    )
    first, last = min(rows[0] // tile, tiles[0]), max(-(-rows[1] // tile), tiles[1])
    for at in itertools.product(*(range(*axis) for axis in stack)):
        place = tuple(one - start for one, (start, _) in zip(at, stack, strict=True))
        for begin in range(first, last, at_once):
            end = min(begin + at_once, last)
            part = (*((one, one + 1) for one in at), (begin * tile, end * tile), columns)
            piece = jax.device_put(_read(source, part, dtype), device)
            wanted_rows = _intersect(rows, part[-2])
            wanted_tiles = _intersect(tiles, (begin, end))
            held = _write(
                *held,
                piece,
                place,
                wanted_rows[0] - rows[0],
                wanted_tiles[0] - tiles[0],
                rows=(wanted_rows[0] - begin * tile, wanted_rows[1] - begin * tile),
                tiles=(wanted_tiles[0] - begin, wanted_tiles[1] - begin),
                quantization=format_of(leaf),
            )
            # Without this, the next piece would be read while this one is still in memory.
            jax.block_until_ready(held)
    return held


@functools.partial(
    jax.jit, donate_argnums=(0, 1), static_argnames=("rows", "tiles", "quantization")
)
def _write(
    values: jax.Array,
    scales: jax.Array,
    piece: jax.Array,
    place: tuple[jax.Array, ...],
    row: jax.Array,
    tile: jax.Array,
    *,
    rows: tuple[int, int],
    tiles: tuple[int, int],
    quantization: str,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes a piece and writes its wanted rows and tiles into `values` and `scales`."""
    q = quantize(piece, quantization)
    values = jax.lax.dynamic_update_slice(values, q.qvalue[..., slice(*rows), :], (*place, row, 0))
    scales = jax.lax.dynamic_update_slice(scales, q.scale[..., slice(*tiles), :], (*place, tile, 0))
    return values, scales


def _device_ranges(leaf: Any, sharding: Sharding) -> dict[jax.Device, Ranges]:
    """Returns the range of a leaf that each device of this process holds."""
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    return {device: _ranges(index, leaf.shape) for device, index in indices.items()}


def _ranges(index: Any, shape: tuple[int, ...]) -> Ranges:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _shape(ranges: Ranges) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in ranges)


def _intersect(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Returns the intersection of two ranges; if empty, an empty range inside the second."""
    start = min(max(one[0], other[0]), other[1])
    return start, max(start, min(one[1], other[1]))


def _read(source: LeafSource, ranges: Ranges, dtype: Any) -> np.ndarray:
    part = _aligned_empty(_shape(ranges), dtype)
    source.read_into(part, ranges)
    return part


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an aligned array, which the CPU backend uses without a copy."""
    dtype = np.dtype(dtype)
    size = dtype.itemsize * math.prod(shape)
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)
