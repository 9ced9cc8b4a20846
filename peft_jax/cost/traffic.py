"""Counts the bytes of main memory that an instruction reads and writes, and its elementwise work.

An array in on-chip memory costs nothing. A fusion reads of an operand what it takes slices of, and
writes into an operand that it updates in place only the update.
"""

import dataclasses

from peft_jax.cost.hlo import HBM, Array, Computation, Instruction, Program

FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "partition-id",
        "replica-id",
        "after-all",
        "optimization-barrier",
        "iota",
        "opt-barrier",
        "domain",
        "add-dependency",
    )
)
"""Operations that move nothing."""

_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "reshape", "convert", "copy", "transpose")
"""Operations that pass a sliced operand on inside a fusion."""

_CHEAP = frozenset(
    (
        "add",
        "subtract",
        "multiply",
        "maximum",
        "minimum",
        "select",
        "compare",
        "and",
        "or",
        "not",
        "xor",
        "negate",
        "abs",
        "clamp",
        "convert",
        "floor",
        "ceil",
        "round-nearest-even",
        "shift-left",
        "shift-right-logical",
        "sign",
        "is-finite",
    )
)
_DEAR = frozenset(
    (
        "exponential",
        "exponential-minus-one",
        "log",
        "log-plus-one",
        "logistic",
        "tanh",
        "rsqrt",
        "sqrt",
        "divide",
        "power",
        "cosine",
        "sine",
        "tan",
        "erf",
        "cbrt",
        "atan2",
        "remainder",
    )
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Work of an instruction apart from its products.

    Attributes:
      bytes: Bytes of main memory that are read and written.
      elementwise: Elementwise operations.
      transcendental: Exponentials, roots, divisions and the like, one by one.
    """

    bytes: float = 0.0
    elementwise: float = 0.0
    transcendental: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.bytes + other.bytes,
            self.elementwise + other.elementwise,
            self.transcendental + other.transcendental,
        )


def count_traffic(program: Program, computation: Computation, one: Instruction) -> Traffic:
    """Returns the memory traffic and elementwise work of an instruction.

    Args:
      program: The program.
      computation: The computation of the instruction.
      one: An instruction that runs by itself: a fusion, or an operation outside of one.
    """
    if one.opcode in FREE:
        return Traffic()
    if one.opcode == "fusion":
        inner = program.computations[one.called()[0]]
        read = sum(
            _read(program, inner, inner.parameters[number])
            for number in range(len(one.operands))
            if number in inner.parameters
        )
        written = _written(program, inner, inner.root)
        return Traffic(bytes=read + written) + _elementwise(program, inner)
    operands = [computation.instructions[name] for name in one.operands]
    if one.opcode in _SLICES:
        return Traffic(bytes=2.0 * _in_memory(one.result))
    if one.opcode == "dynamic-update-slice":
        return Traffic(bytes=2.0 * _in_memory(operands[1].result))
    read = sum(_in_memory(operand.result) for operand in operands)
    return Traffic(bytes=read + _in_memory(one.result)) + _own_work(one, computation)


def _in_memory(arrays: tuple[Array, ...]) -> float:
    return float(sum(one.bytes for one in arrays if one.space == HBM))


def _read(program: Program, computation: Computation, parameter: Instruction) -> float:
    """Returns the bytes that a fusion reads of one of its operands."""
    if not any(array.space == HBM for array in parameter.result):
        return 0.0
    whole, size = _in_memory(parameter.result), sum(array.size for array in parameter.result)
    return min(_share_read(program, computation, parameter, size), 1.0) * whole


def _share_read(program: Program, computation: Computation, one: Instruction, size: int) -> float:
    """Returns the share of an array's `size` elements that is read by the users of `one`."""
    share = 0.0
    for user in computation.users.get(one.name, []):
        first = user.operands[0] == one.name
        if user.opcode in _SLICES and first:
            share += user.result[0].size / size
        elif user.opcode == "dynamic-update-slice" and first:
            # The rest stays where it is.
            continue
        elif user.opcode in _SAME and not user.root:
            share += _share_read(program, computation, user, size)
        elif user.opcode == "pad" and first and not user.root:
            padded = one.result[0].size / user.result[0].size
            share += _share_read(program, computation, user, size) * padded
        elif user.opcode == "fusion":
            inner = program.computations[user.called()[0]]
            for number, operand in enumerate(user.operands):
                if operand != one.name or number not in inner.parameters:
                    continue
                if not user.root and _passes_on(inner, inner.parameters[number]):
                    share += _share_read(program, computation, user, size)
                else:
                    share += _share_read(program, inner, inner.parameters[number], size)
        elif user.opcode not in ("tuple", "get-tuple-element"):
            return 1.0
        if share >= 1.0:
            return 1.0
    return share


def _passes_on(computation: Computation, parameter: Instruction) -> bool:
    """Returns whether a fusion within a fusion only passes an operand on, in another layout.

    The compiler tiles arrays of 8-bit integers anew in such a fusion before it slices them. What is
    read is what the outer fusion takes of its result.
    """
    one = computation.root
    while one.opcode in _SAME:
        one = computation.instructions[one.operands[0]]
    return one is parameter


def _written(program: Program, computation: Computation, root: Instruction) -> float:
    """Returns the bytes that a fusion writes."""
    if root.opcode == "tuple":
        return sum(
            _written(program, computation, computation.instructions[name]) for name in root.operands
        )
    if root.opcode == "parameter" or not any(a.space == HBM for a in root.result):
        return 0.0
    if root.opcode == "dynamic-update-slice":
        return float(sum(a.bytes for a in computation.instructions[root.operands[1]].result))
    if root.opcode == "bitcast":
        return _written(program, computation, computation.instructions[root.operands[0]])
    if root.opcode == "fusion":
        inner = program.computations[root.called()[0]]
        return _written(program, inner, inner.root)
    return _in_memory(root.result)


def _elementwise(program: Program, computation: Computation) -> Traffic:
    total = Traffic()
    for one in computation.instructions.values():
        if one.opcode == "fusion":
            total += _elementwise(program, program.computations[one.called()[0]])
        else:
            total += _own_work(one, computation)
    return total


def _own_work(one: Instruction, computation: Computation) -> Traffic:
    size = float(one.result[0].size) if one.result else 0.0
    if one.opcode in _CHEAP:
        return Traffic(elementwise=size)
    if one.opcode in _DEAR:
        return Traffic(elementwise=size, transcendental=size)
    if one.opcode in ("reduce", "reduce-window"):
        operand = computation.instructions[one.operands[0]]
        return Traffic(elementwise=float(operand.result[0].size))
    return Traffic()
