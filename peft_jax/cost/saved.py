"""Finds what a compiled step keeps of its layers' forward pass for the backward pass."""

import dataclasses
import re
from collections.abc import Iterator

from peft_jax.cost.hlo import HOST, Array, Computation, Instruction, Program
from peft_jax.cost.loops import count_runs

_PASSING = ("bitcast", "copy", "copy-start", "copy-done", "reshape", "transpose", "convert")
_PASSING_BACK = (*_PASSING, "async-done", "async-update", "get-tuple-element")
_OUTSIDE = 3
"""Largest number of layers that the compiler takes out of a loop, to run transfers ahead."""
_STEPS = 12
"""Number of operations that are followed from one array to another."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """Bytes on one device of what the layers' forward pass leaves for their backward pass.

    Attributes:
      device: Bytes in the device's memory.
      host: Bytes in its host's memory.
    """

    device: int
    host: int


def find_saved(program: Program, *, layers: int) -> Saved | None:
    """Returns what is saved between two loops over the layers; None if there are no such loops.

    The forward loop writes it layer by layer into stacked arrays, which a later loop reads. Arrays
    count with the padding of their layouts, where they lie and as they are sharded.

    Args:
      program: A compiled training step.
      layers: Number of layers.
    """
    trips = count_runs(program).trips
    device = host = 0
    found = False
    for computation in program.computations.values():
        loops = [
            one
            for one in computation.instructions.values()
            if one.opcode == "while"
            and layers - _OUTSIDE <= trips.get(one.name, 0) <= layers
            and any(array.shape[:1] == (layers,) for array in one.result)
        ]
        if len(loops) < 2:
            continue
        found = True
        read = [set(_read_by(program, computation, one)) for one in loops]
        for number, loop in enumerate(loops):
            later = set().union(*read[number + 1 :])
            for index, array in _written(program, loop, layers):
                if (loop.name, index) in later:
                    device += 0 if array.space == HOST else array.bytes
                    host += array.bytes if array.space == HOST else 0
    return Saved(device, host) if found else None


def _written(program: Program, loop: Instruction, layers: int) -> Iterator[tuple[int, Array]]:
    """Yields the stacked arrays that a loop writes layer by layer, by place in its tuple."""
    body = re.search(r"body=%?([\w.\-]+)", loop.attributes)
    if body is None:
        return
    inside = program.computations[body[1]]
    if inside.root.opcode != "tuple":
        return
    for index, (name, array) in enumerate(zip(inside.root.operands, loop.result, strict=False)):
        stacked = array.shape[:1] == (layers,)
        if stacked and _is_updated(program, inside, inside.instructions[name]):
            yield index, array


def _is_updated(program: Program, computation: Computation, one: Instruction) -> bool:
    """Returns whether a value is an array of which one slice has been replaced."""
    for _ in range(_STEPS):
        if one.opcode == "dynamic-update-slice":
            return True
        if one.opcode in ("fusion", "async-start", "call"):
            computation = program.computations[one.called()[0]]
            one = computation.root
        elif one.opcode in _PASSING_BACK and one.operands:
            source = computation.instructions[one.operands[0]]
            if one.opcode == "get-tuple-element" and source.opcode == "fusion":
                computation = program.computations[source.called()[0]]
                source = computation.root
                if source.opcode == "tuple":
                    place = int(one.attribute("index") or 0)
                    source = computation.instructions[source.operands[place]]
            one = source
        else:
            return False
    return False


def _read_by(
    program: Program, computation: Computation, loop: Instruction
) -> Iterator[tuple[str, int]]:
    """Yields the results of other loops, by name and place, that a loop gets in its tuple."""
    start = computation.instructions[loop.operands[0]]
    for name in start.operands:
        one = computation.instructions[name]
        for _ in range(_STEPS):
            if one.opcode == "get-tuple-element":
                source = computation.instructions[one.operands[0]]
                if source.opcode == "while":
                    yield source.name, int(one.attribute("index") or 0)
                    break
            operand = _updated_operand(program, one)
            if operand is None:
                break
            one = computation.instructions[operand]


def _updated_operand(program: Program, one: Instruction) -> str | None:
    """Returns the operand whose array an operation passes on, with or without an update."""
    if one.opcode in (*_PASSING_BACK, "dynamic-update-slice") and one.operands:
        return one.operands[0]
    if one.opcode in ("fusion", "async-start"):
        # A layer that the compiler has taken out of the loop updates its slice after it.
        inner = program.computations[one.called()[0]]
        root = inner.root
        for _ in range(_STEPS):
            if root.opcode == "parameter":
                return one.operands[int(root.literal)]
            if root.opcode not in (*_PASSING, "dynamic-update-slice"):
                return None
            root = inner.instructions[root.operands[0]]
    return None
