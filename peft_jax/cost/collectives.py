"""Reads the collectives of a compiled program from its HLO text.

A collective in a loop counts once per iteration, unlike in the compilers' own analyses.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERATION = re.compile(rf"\s({'|'.join(KINDS)})(-start)?\(([^)]*)\)")
_WHILE = re.compile(r"\swhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_COMPARED = re.compile(r"ROOT .* compare\(([^)]*)\), direction=(LT|GT)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: One of `KINDS`; between slices, the runtime's name of the operation.
      bytes: Minimum number of bytes that one device receives each time.
      group: Number of devices that take part.
      times: Number of executions in one run of the program.
      between_slices: Whether it crosses the data-center network.
    """

    kind: str
    bytes: float
    group: int
    times: int
    between_slices: bool

    @property
    def total(self) -> float:
        """Number of bytes that one device receives in one run of the program."""
        return self.bytes * self.times


@dataclasses.dataclass
class _Computation:
    lines: list[str]
    entry: bool


def read_collectives(text: str, *, devices_a_slice: int) -> list[Collective]:
    """Returns the collectives of a compiled program.

    In a group of n devices, each receives (n-1)/n of the full array in an all-gather, a
    reduce-scatter or an all-to-all. An all-reduce is both of the first two and receives twice that.

    Args:
      text: HLO text of the program after the compiler's passes.
      devices_a_slice: Number of consecutive devices that share a slice's network.

    Raises:
      ValueError: The text has no entry computation.
    """
    computations = dict(_computations(text))
    entry = [name for name, computation in computations.items() if computation.entry]
    if not entry:
        raise ValueError("the text is not a compiled program's HLO: it has no ENTRY computation")
    found: list[Collective] = []

    def visit(name: str, times: int, seen: set[str]) -> None:
        """Collects from one computation; `seen` holds the channels found in the same loop body.

        The compiler may spread a collective over several fusions, to overlap it with them. It
        appears in each of them, with the same channel.
        """
        for line in computations[name].lines:
            loop = _WHILE.search(line)
            if loop is not None:
                trips = _trip_count(line, computations[loop[1]])
                visit(loop[2], times * trips, set())
                continue
            if " recv(" in line and (transfer := _BETWEEN_SLICES.search(line)):
                found.append(_between_slices(line, transfer[1], times))
                continue
            operation = _OPERATION.search(line)
            if operation is not None:
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line
                if key not in seen:
                    seen.add(key)
                    scatters = name.startswith("all-reduce-scatter")
                    found.extend(_collective(line, operation, times, scatters, devices_a_slice))
                continue
            for called in _called(line):
                if called in computations:
                    visit(called, times, seen)

    visit(entry[0], 1, set())
    return found


def _computations(text: str) -> Iterator[tuple[str, _Computation]]:
    name, current = "", _Computation([], entry=False)
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, current = header[2], _Computation([], entry=header[1] is not None)
        elif line.startswith("}"):
            if name:
                yield name, current
            name = ""
        elif name:
            current.lines.append(line)


def _called(line: str) -> list[str]:
    branches = [
        one.strip().lstrip("%") for m in _BRANCHES.finditer(line) for one in m[1].split(",")
    ]
    return [m[1] for m in _CALLED.finditer(line)] + branches


def _trip_count(line: str, condition: _Computation) -> int:
    """Returns a loop's trip count: the compiler's note, or the constant it counts to.

    A loop whose end is computed counts once. Attention has such loops, but they send nothing.
    """
    if noted := _TRIPS.search(line):
        return int(noted[1])
    constants = {}
    for inner in condition.lines:
        if match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", inner):
            constants[match[1]] = int(match[2])
    for inner in condition.lines:
        if compared := _COMPARED.search(inner):
            names = re.findall(r"%([\w.\-]+)", compared[1]) or compared[1].split(", ")
            ends = [constants[name] for name in names if name in constants]
            return ends[0] if ends else 1
    return 1


def _between_slices(line: str, kind: str, times: int) -> Collective:
    """Returns the collective of a receive between slices, which the TPU's host performs."""
    result = line.split(" recv(")[0]
    dtype, shape = _ARRAY.findall(result)[0]
    slices = re.search(r'_xla_megascale_target="\{([\d,]*)\}', line)
    return Collective(
        kind=kind.lower().replace("_", "-"),
        bytes=float(_size(dtype, shape)),
        group=len(slices[1].split(",")) if slices else 2,
        times=times,
        between_slices=True,
    )


def _collective(
    line: str, operation: re.Match[str], times: int, scatters: bool, devices_a_slice: int
) -> Iterator[Collective]:
    kind = "reduce-scatter" if scatters and operation[1] == "all-reduce" else operation[1]
    instruction = _INSTRUCTION.match(line)
    if instruction is None:
        return
    result = instruction[2][: instruction[2].index(operation[0].strip().split("(")[0])]
    sizes = [_size(m[1], m[2]) for m in _ARRAY.finditer(result)]
    if operation[2]:
        # The result of an asynchronous start also contains the operands.
        sizes = sizes[len(sizes) // 2 :] if kind != "collective-permute" else sizes[1:2]
    whole = float(sum(sizes))
    groups = _groups(line)
    group = groups.shape[1] if groups is not None else 1
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{([^=]*?)\}(?:,|\s|$)", line + " ")
        numbers = [int(n) for n in re.findall(r"\d+", pairs[1])] if pairs else []
        groups, group = np.array(numbers).reshape(-1, 2), 2
        share = 1.0
    elif group == 1:
        return
    else:
        share = (group - 1) / group
        if kind == "all-reduce":
            share *= 2
        if kind == "reduce-scatter" and not scatters:
            whole *= group
    crosses = groups is not None and bool(
        np.any(groups // devices_a_slice != groups[:, :1] // devices_a_slice)
    )
    yield Collective(
        kind=kind, bytes=whole * share, group=group, times=times, between_slices=crosses
    )


def _size(dtype: str, shape: str) -> int:
    """Returns the bytes of an array, given its dtype and shape in HLO syntax.

    Example:
      >>> _size("bf16", "4,1024"), _size("s32", ""), _size("f8e4m3fn", "8"), _size("s4", "8")
      (8192, 4, 8, 4)
    """
    count = math.prod(int(n) for n in shape.split(",") if n)
    if dtype in _BYTES:
        return count * _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return count * int(bits[0]) // 8 if bits else 0


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
