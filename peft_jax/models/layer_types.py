"""Types of decoder layers, and how equal ones repeat."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from peft_jax.core.validation import check_positive, check_positive_int
from peft_jax.models.rope import RotarySettings

_Item = TypeVar("_Item")

_MAX_PERIOD = 32
"""Largest number of layers in a period; it bounds the work for models of many layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """Multiplier of queries that grows with their position: 1 + slope ln(1 + ⌊(p + first) / step⌋).

    It keeps attention sharp over many keys.

    Attributes:
      slope: Growth.
      step: Number of tokens over which the multiplier stays the same.
      first: Number of the first position.

    Source: Nakanishi, 2025, arXiv 2501.19399, as in Llama 4.

    Example:
      >>> temperature = Temperature(slope=1.0, step=2, first=1)
      >>> [round(factor, 3) for factor in temperature.factors(jnp.arange(4)[None])[0].tolist()]
      [1.0, 1.693, 1.693, 2.099]
    """

    slope: float
    step: int
    first: int = 0

    def __post_init__(self) -> None:
        check_positive("attn_scale", self.slope)
        check_positive_int("floor_scale", self.step)

    def factors(self, positions: Int[Array, "batch tokens"]) -> Float32[Array, "batch tokens"]:
        """Returns the multiplier of each token's query."""
        steps = (positions + self.first) // self.step
        return 1.0 + self.slope * jnp.log1p(steps.astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerType:
    """What differs between the layers of one decoder.

    Attributes:
      form: Name of the form of block, if forms have different parameters; see `MixedBlocks`.
      window: Number of tokens that a token attends to, itself included; None for all.
      chunk: Number of positions of a chunk, beyond which a token does not attend; None for all.
      rotary: Rotary embedding of queries and keys; None for none.
      temperature: Multiplier of queries by position; None for none.
    """

    form: str = ""
    window: int | None = None
    chunk: int | None = None
    rotary: RotarySettings | None = None
    temperature: Temperature | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            check_positive_int("sliding_window", self.window)
        if self.chunk is not None:
            check_positive_int("attention_chunk_size", self.chunk)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive layers that repeat a period of types.

    Attributes:
      start: Index of the first layer.
      period: Number of layers after which the types repeat.
      repeats: Number of periods.
    """

    start: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        """Index after the last layer."""
        return self.start + self.period * self.repeats


def find_segments(types: Sequence[object]) -> list[Segment]:
    """Splits a list into segments, each of which repeats a period.

    From each start, the period that covers most layers is taken, the shortest of equals.

    Example:
      >>> find_segments("aaaa")
      [Segment(start=0, period=1, repeats=4)]
      >>> find_segments("aabaabaa")
      [Segment(start=0, period=3, repeats=2), Segment(start=6, period=1, repeats=2)]
    """
    segments, start = [], 0
    while start < len(types):
        longest = min(_MAX_PERIOD, max(1, (len(types) - start) // 2))
        found = [
            Segment(start, period, _count_repeats(types, start, period))
            for period in range(1, longest + 1)
        ]
        repeating = [one for one in found if one.repeats > 1 or one.period == 1]
        segments.append(max(repeating, key=lambda one: (one.stop, -one.period)))
        start = segments[-1].stop
    return segments


def _count_repeats(types: Sequence[object], start: int, period: int) -> int:
    end = start + period
    while end < len(types) and types[end] == types[end - period]:
        end += 1
    return (end - start) // period


def shortest_cycle(types: Sequence[_Item]) -> tuple[_Item, ...]:
    """Returns the shortest beginning whose repetition gives the list.

    Example:
      >>> shortest_cycle("aabaabaa")
      ('a', 'a', 'b')
    """
    return next(
        tuple(types[:size]) for size in range(1, len(types) + 1) if types[size:] == types[:-size]
    )
