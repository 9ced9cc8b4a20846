"""Reads the collectives of a compiled program.

A collective in a loop counts once per iteration, unlike in the compilers' own analyses.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from peft_jax.cost.hlo import Instruction, bits_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Collectives within a slice."""

_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: One of `KINDS`; between slices, the runtime's name of the operation.
      bytes: Minimum number of bytes that one device receives each time.
      group: Number of devices that take part.
      times: Number of executions in one run of the program.
      between_slices: Whether it crosses the data-center network.
      members: Devices of the first group, in order.
      pairs: Source and target of each part of a permute.
    """

    kind: str
    bytes: float
    group: int
    times: float
    between_slices: bool
    members: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def total(self) -> float:
        """Number of bytes that one device receives in one run of the program."""
        return self.bytes * self.times


def read_collective(
    one: Instruction, *, scatters: bool = False, devices_a_slice: int
) -> Collective | None:
    """Returns the collective of an instruction, once; None if it is none, or sends nothing.

    In a group of n devices, each receives (n-1)/n of the full array in an all-gather, a
    reduce-scatter or an all-to-all. An all-reduce is both of the first two and receives twice that.

    Args:
      one: Instruction. Of an asynchronous collective, only the start counts.
      scatters: Whether an all-reduce is the part of a fusion that scatters its result.
      devices_a_slice: Number of consecutive devices that share a slice's network.
    """
    if one.opcode == "recv" and (transfer := _BETWEEN_SLICES.search(one.attributes)):
        return _between_slices(one, transfer[1])
    kind = one.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if scatters and kind == "all-reduce":
        kind = "reduce-scatter"
    sizes = [array.size * bits_of(array.dtype) / 8 for array in one.result]
    if one.opcode.endswith("-start"):
        # The result of an asynchronous start also contains the operands, and flags.
        sizes = sizes[1:2] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
    whole = float(sum(sizes))
    if kind == "collective-permute":
        pairs = _pairs(one.attributes)
        groups, share = np.array(pairs).reshape(-1, 2), 1.0
        group = 2
    else:
        found = _groups(one.attributes)
        if found is None or found.shape[1] == 1:
            return None
        groups, group, pairs = found, found.shape[1], ()
        share = (group - 1) / group
        if kind == "all-reduce":
            share *= 2
        if kind == "reduce-scatter" and not scatters:
            whole *= group
    return Collective(
        kind=kind,
        bytes=whole * share,
        group=group,
        times=1.0,
        between_slices=bool(np.any(groups // devices_a_slice != groups[:, :1] // devices_a_slice)),
        members=tuple(int(n) for n in groups[0]) if len(groups) else (),
        pairs=pairs,
    )


def _between_slices(one: Instruction, kind: str) -> Collective:
    """Returns the collective of a receive between slices, which the TPU's host performs."""
    array = one.result[0]
    slices = re.search(r'_xla_megascale_target="\{([\d,]*)\}', one.attributes)
    return Collective(
        kind=kind.lower().replace("_", "-"),
        bytes=array.size * bits_of(array.dtype) / 8,
        group=len(slices[1].split(",")) if slices else 2,
        times=1.0,
        between_slices=True,
    )


def _pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    text = re.search(r"source_target_pairs=\{([^=]*?)\}(?:,|\s|$)", attributes + " ")
    numbers = [int(n) for n in re.findall(r"\d+", text[1])] if text else []
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _groups(line: str) -> np.ndarray | None:
    """Returns the device groups [groups, devices] of a collective; None if none are named."""
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", line):
        return np.array(
            [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", match[1])]
        )
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sizes = (tuple(map(int, match[i].split(","))) for i in (1, 2))
        order = tuple(map(int, match[3].split(","))) if match[3] else tuple(range(len(sizes)))
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
        return devices.reshape(shape).reshape(shape[0], -1)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", line):
        return _mesh_groups(match[1], match[2], match[3])
    return None


def _mesh_groups(mesh: str, order: str, axes: str) -> np.ndarray:
    """Returns the groups along mesh axes or parts of them: mesh['a'=4,'b'=2] {'a':(1)2,'b'}."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    shape: list[int] = []
    chosen: list[int] = []
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        parts.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    for name, size in sizes.items():
        position = 1
        for before, part in sorted(parts.get(name, [])):
            if before > position:
                shape.append(before // position)
            chosen.append(len(shape))
            shape.append(part)
            position = before * part
        shape.append(size // position)
    listed = re.search(r"device_ids=\(?\[?([\d,]+)\]?", order)
    count = math.prod(sizes.values())
    ids: Sequence[int] = [int(n) for n in listed[1].split(",")] if listed else range(count)
    devices = np.array(ids if len(ids) == count else range(count)).reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    group = math.prod(shape[axis] for axis in chosen)
    return devices.transpose((*rest, *chosen)).reshape(-1, group)
