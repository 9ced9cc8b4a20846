"""Reads the text of a compiled program (HLO) into computations of instructions.

The text is what `jax.stages.Compiled.as_text` returns, or what the compiler dumps. TPU compilers
write the instructions of a computation in the order in which they run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

HBM, VMEM, HOST = 0, 1, 5
"""Memory spaces of arrays in a TPU's layouts: main memory, on-chip memory, the host's memory."""

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_END = re.compile(r"^\}(?:, execution_thread=\S+)?$")
_BEGINS = re.compile(r"^(?:\s+(?:ROOT )?%?[\w.\-]+ = |(?:ENTRY )?%?[\w.\-]+ \(|\}(?:,|$)|$)")
"""Beginnings of an instruction, a computation, its end, and an empty line."""
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      dtype: Name of the dtype in HLO.
      shape: Dimensions.
      space: Memory space, such as `HBM`.
      bytes: Number of bytes that it takes, with the padding of its layout's tiles.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int
    bytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: Name, unique in its program.
      opcode: Operation, such as "fusion".
      result: Arrays of the result; a tuple's in order.
      operands: Names of the operands, instructions of the same computation.
      literal: Text between the parentheses, such as a constant's value.
      attributes: Text after the operands.
      root: Whether its result is the computation's.
    """

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    def called(self) -> list[str]:
        """Returns the names of the computations that it calls."""
        branches = [
            one.strip().lstrip("%")
            for match in _BRANCHES.finditer(self.attributes)
            for one in match[1].split(",")
        ]
        return [match[1] for match in _CALLED.finditer(self.attributes)] + branches

    def attribute(self, name: str) -> str | None:
        """Returns the text of an attribute that is a word or is in braces; None if absent."""
        match = re.search(rf"(?:^|[ ,]){name}=(\{{[^{{}}]*\}}|[^\s,]+)", self.attributes)
        return None if match is None else match[1]

    @property
    def op_name(self) -> str:
        """Operation of the traced program that it comes from; empty if unknown."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions in the order in which they run, by name."""

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """Instruction whose result is the computation's."""
        return next(one for one in self.instructions.values() if one.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {
            int(one.literal): one for one in self.instructions.values() if one.opcode == "parameter"
        }

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions by the name of an operand."""
        users: dict[str, list[Instruction]] = {}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                users.setdefault(operand, []).append(one)
        return users


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: Computations by name.
      entry: Name of the one that runs first.
    """

    computations: Mapping[str, Computation]
    entry: str


def read_program(text: str) -> Program:
    """Reads a compiled program.

    Raises:
      ValueError: The text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    lines: dict[str, Instruction] = {}
    for line in _joined(text):
        if header := _COMPUTATION.match(line):
            name, lines = header[2], {}
            entry = name if header[1] else entry
        elif _END.match(line):
            if name:
                computations[name] = Computation(name, lines)
            name = ""
        elif name and (one := _read_instruction(line)) is not None:
            lines[one.name] = one
    if not entry:
        raise ValueError("the text is not a compiled program's HLO: it has no ENTRY computation")
    return Program(computations, entry)


def _joined(text: str) -> Iterator[str]:
    """Yields the lines of a text, each instruction as one.

    A constant or a kernel's metadata may be written over several lines.
    """
    held = ""
    for line in text.splitlines():
        if held and not _BEGINS.match(line):
            held += line
            continue
        if held:
            yield held
        held = line
    yield held


def _read_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = match[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opened = rest.find("(", end)
    if end < 0 or opened < 0:
        return None
    closed = _closing(rest, opened)
    literal = rest[opened + 1 : closed]
    opcode = rest[end:opened].strip()
    return Instruction(
        name=match[2],
        opcode=opcode,
        result=tuple(read_arrays(rest[:end])),
        operands=() if opcode in ("constant", "parameter") else tuple(_operands(literal)),
        literal=literal,
        attributes=rest[closed + 1 :].lstrip(", "),
        root=match[1] is not None,
    )


def _closing(text: str, opened: int) -> int:
    """Returns the index of the parenthesis that closes the one at `opened`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opened):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _operands(text: str) -> Iterator[str]:
    """Yields the operands' names; their types may stand before them."""
    if "%" in text:
        yield from re.findall(r"%([\w.\-]+)", text)
        return
    for one in text.split(","):
        if words := one.split():
            yield words[-1].split("*/")[-1]


def read_arrays(text: str) -> Iterator[Array]:
    """Yields the arrays of a type.

    Example:
      >>> [one.bytes for one in read_arrays("(bf16[4,100]{1,0:T(8,128)(2,1)S(1)}, s32[], s4[8])")]
      [2048, 4, 4]
    """
    for match in _ARRAY.finditer(text):
        shape = tuple(int(n) for n in match[2].split(",") if n)
        layout = match[3] or ""
        space = _SPACE.search(layout)
        yield Array(
            dtype=match[1],
            shape=shape,
            space=int(space[1]) if space else HBM,
            bytes=math.ceil(math.prod(_padded(shape, layout)) * bits_of(match[1]) / 8),
        )


def bits_of(dtype: str) -> int:
    """Returns the bits of an element.

    Example:
      >>> bits_of("bf16"), bits_of("f8e4m3fn"), bits_of("s4"), bits_of("pred")
      (16, 8, 4, 8)
    """
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0


def _padded(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Returns the dimensions with the padding of the layout's first tile."""
    order, tile = layout.partition(":")[0], _TILE.search(layout)
    if not shape or not tile or not order:
        return shape
    padded = list(shape)
    minor_first = [int(n) for n in order.split(",")]
    sizes = [int(n) for n in tile[1].split(",")][::-1]
    for axis, size in zip(minor_first, sizes, strict=False):
        padded[axis] = -(-padded[axis] // size) * size
    return tuple(padded)
