"""AdamW's moments in 8 bits per parameter: codes of a dynamic map, with a scale for each block."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from peft_jax.core import names_of
from peft_jax.optim.matrices import stack_axes

BLOCK = 256
"""Largest number of entries that share a scale."""

_LEAST_BLOCK = 32
_LEAST_ENTRIES = 4096
_EXPONENTS = 7


class EightBitState(NamedTuple):
    """State of `scale_by_adam_8bit`.

    Attributes:
      count: Number of steps taken, int32 [].
      mu: Codes of the first moment, uint8, shaped as the parameters.
      mu_scales: Largest magnitude of each block of the first moment, float32 [..., blocks, ...].
      nu: Codes of the second moment, as `mu`.
      nu_scales: Scales of the second moment, as `mu_scales`.
    """

    count: Any
    mu: Any
    mu_scales: Any
    nu: Any
    nu_scales: Any


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam's direction, with moments held in 8 bits between steps.

    A block is up to 256 adjacent entries along one axis of an array. Its entries are divided by
    the largest magnitude among them, and rounded to the nearest of 256 levels of a dynamic map,
    whose steps are finer towards zero. A step decodes both moments, updates them in float32, takes
    its direction from them, and encodes them again. Codes have the shape of their parameters, so
    they are sharded like float32 moments.

    Arrays of fewer than 4,096 entries per layer, or without a block of 32, keep float32 moments.
    They are few, and include norms and biases.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Constant added to the denominator.

    Source: Dettmers et al., 2022, arXiv 2110.02861, with blocks of 256 in place of 2,048.

    Example:
      >>> params = {"kernel": jnp.zeros((64, 64))}
      >>> adam = optax.scale_by_adam()
      >>> adam_8bit = scale_by_adam_8bit(b1=0.9, b2=0.999, eps=1e-8)
      >>> nbytes = lambda state: sum(leaf.nbytes for leaf in jax.tree.leaves(state))
      >>> nbytes(adam.init(params)), nbytes(adam_8bit.init(params))
      (32772, 8712)
    """
    inner = {
        "8 bits": _adam_in_8_bits(b1, b2, eps),
        "32 bits": optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    }
    return optax.partition(inner, _precisions)


def _adam_in_8_bits(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam's direction with every array's moments in 8 bits."""

    def init(params: Any) -> EightBitState:
        zeros = jax.tree_util.tree_map_with_path(
            lambda path, p: encode(jnp.zeros(p.shape, jnp.float32), _axis(path, p), signed=True),
            params,
        )
        codes, scales = _unzip(params, zeros, 2)
        # The code of zero in the map without a sign is 0.
        none = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.uint8), params)
        copies = jax.tree.map(jnp.copy, scales)
        return EightBitState(jnp.zeros([], jnp.int32), codes, scales, none, copies)

    def update(updates: Any, state: EightBitState, params: Any = None) -> tuple[Any, EightBitState]:
        del params
        count = optax.safe_increment(state.count)
        rest = (1.0 - jnp.power(decay, count.astype(jnp.float32)) for decay in (b1, b2))
        correction, correction_of_squares = rest

        def one(
            path: Any, g: Array, mu: Array, mu_scales: Array, nu: Array, nu_scales: Array
        ) -> tuple[Array, ...]:
            axis = _axis(path, g)
            mu = b1 * decode(mu, mu_scales, axis, signed=True) + (1.0 - b1) * g
            nu = b2 * decode(nu, nu_scales, axis, signed=False) + (1.0 - b2) * jnp.square(g)
            direction = (mu / correction) / (jnp.sqrt(nu / correction_of_squares) + eps)
            return (
                direction,
                *encode(mu, axis, signed=True),
                *encode(nu, axis, signed=False),
            )

        made = jax.tree_util.tree_map_with_path(one, updates, *state[1:])
        directions, *moments = _unzip(updates, made, 5)
        return directions, EightBitState(count, *moments)

    return optax.GradientTransformation(init, update)


def encode(
    values: Float[Array, "..."], axis: int, *, signed: bool
) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
    """Quantizes an array by blocks along an axis.

    Args:
      values: Array.
      axis: Axis that is divided into blocks.
      signed: Whether the map has negative levels.

    Returns:
      Codes shaped as `values`, and scales, whose `axis` has one entry per block.
    """
    blocks = _blocked(values, axis)
    scales = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
    levels = _levels(signed)
    middles = jnp.asarray((levels[1:] + levels[:-1]) / 2, jnp.float32)
    parts = blocks / jnp.where(scales == 0, 1.0, scales)
    codes = jnp.searchsorted(middles, parts, method="scan_unrolled").astype(jnp.uint8)
    return codes.reshape(values.shape), jnp.squeeze(scales, axis + 1)


def decode(
    codes: UInt8[Array, "..."], scales: Float[Array, "..."], axis: int, *, signed: bool
) -> Float[Array, "..."]:
    """Returns the array that `encode` has quantized, in float32."""
    levels = jnp.asarray(_levels(signed), jnp.float32)
    blocks = levels[_blocked(codes, axis).astype(jnp.int32)] * jnp.expand_dims(scales, axis + 1)
    return blocks.reshape(codes.shape)


@functools.cache
def _levels(signed: bool) -> np.ndarray:
    """Returns the 256 levels of the dynamic map, increasing from -1 or 0 to 1.

    Level magnitudes lie between powers of ten from 1e-7 to 1. Each higher power has twice as many,
    at equal distances.
    """
    positive: list[float] = []
    for power in range(_EXPONENTS):
        count = 2 ** (power if signed else power + 1)
        edges = np.linspace(0.1, 1.0, count + 1)
        positive.extend(10.0 ** (power - _EXPONENTS + 1) * (edges[1:] + edges[:-1]) / 2)
    negative = [-level for level in positive] if signed else []
    return np.sort(np.array([*negative, 0.0, *positive, 1.0]))


def _precisions(tree: Any) -> Any:
    """Returns a tree with the precision of each array's moments."""

    def precision(path: Any, leaf: Any) -> str:
        entries = math.prod(leaf.shape[stack_axes(names_of(path)) :])
        small = entries < _LEAST_ENTRIES or _block(leaf.shape[_axis(path, leaf)]) < _LEAST_BLOCK
        return "32 bits" if small else "8 bits"

    return jax.tree_util.tree_map_with_path(precision, tree)


def _axis(path: Any, leaf: Any) -> int:
    """Returns the axis with the largest blocks, the last of several; not an axis over layers."""
    axes = range(min(stack_axes(names_of(path)), leaf.ndim - 1), leaf.ndim)
    return max(axes, key=lambda axis: (_block(leaf.shape[axis]), axis), default=0)


def _block(length: int) -> int:
    """Returns the largest divisor of an axis's length up to `BLOCK`."""
    return next(size for size in range(min(BLOCK, max(length, 1)), 0, -1) if length % size == 0)


def _blocked(values: Array, axis: int) -> Array:
    """Divides an axis into (blocks, entries)."""
    size = _block(values.shape[axis])
    return values.reshape(
        *values.shape[:axis], values.shape[axis] // size, size, *values.shape[axis + 1 :]
    )


def _unzip(like: Any, tuples: Any, count: int) -> list[Any]:
    """Returns the trees of the first to the last of `count` members of a tree of tuples."""
    structure: Any = jax.tree.structure(like)
    flat = structure.flatten_up_to(tuples)
    return [jax.tree.unflatten(structure, [members[at] for members in flat]) for at in range(count)]
