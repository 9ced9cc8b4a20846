"""Says which part of a training step an instruction belongs to.

The model's code marks its parts (`peft_jax.core.scopes`), and the compiler keeps the marks.
"""

import re
from typing import get_args

from peft_jax.core.scopes import Part
from peft_jax.cost.hlo import Computation, Instruction, Program

PARTS: tuple[str, ...] = get_args(Part)
OTHER = "other"
"""Part of what is not marked."""

_NAME = re.compile(rf"(?<![\w])({'|'.join(PARTS)})(?![\w])")
_STEPS = 6
"""Number of operands that are followed back from an instruction without a name."""


def part_of(program: Program, computation: Computation, one: Instruction) -> str:
    """Returns the part of an instruction: its own, its fusion's, or that of what it reads."""
    for _ in range(_STEPS):
        named = find_part(one.op_name)
        if named is None and one.opcode in ("fusion", "async-start"):
            named = _inside(program, one)
        if named is not None:
            return named
        if not one.operands:
            break
        largest = max(
            (computation.instructions[name] for name in one.operands),
            key=lambda operand: sum(array.bytes for array in operand.result),
        )
        one = largest
    return OTHER


def find_part(op_name: str) -> str | None:
    """Returns the innermost part in the name of a traced operation; None if there is none.

    Example:
      >>> find_part("jit(step)/transpose(jvp(attention))/checkpoint/rotation/dot_general")
      'rotation'
    """
    names = _NAME.findall(op_name)
    return names[-1] if names else None


def _inside(program: Program, one: Instruction) -> str | None:
    for name in one.called():
        for inner in reversed(list(program.computations[name].instructions.values())):
            if (named := find_part(inner.op_name)) is not None:
                return named
    return None
