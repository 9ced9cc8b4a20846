"""Counts how often each computation of a compiled program runs.

A loop counts to a bound with a counter of any integer type, from any start, by any step. A loop in
a loop may have a bound that changes with the outer counter, as causal attention has. So the small
integers of a program are evaluated, on device 0, as far as its constants determine them.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.cost.hlo import Computation, Instruction, Program

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LARGEST = 4096
"""Largest number of elements of an array that is evaluated."""
_MOST_TRIPS = 100_000
"""Number of iterations after which a loop is taken to have an unknown end."""

_CALLS = ("call", "conditional", "async-start")
"""Instructions besides loops that run other computations."""

Value = Any
"""An array of integers, a tuple of values, or None if the program's constants do not tell."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Number of runs of each part of a program.

    Attributes:
      times: Number of runs of each computation outside of fusions, by name.
      trips: Mean number of iterations of each `while`, by name of the instruction.
      unknown: Names of the loops whose end the program's constants do not tell. They count once.
    """

    times: Mapping[str, float]
    trips: Mapping[str, float]
    unknown: tuple[str, ...]


def count_runs(program: Program) -> Counts:
    """Returns how often each computation of a program runs.

    A conditional counts all its branches. In `timeline`, only the slowest one takes time.
    """
    times: dict[str, float] = defaultdict(float)
    iterations: dict[str, float] = defaultdict(float)
    starts: dict[str, float] = defaultdict(float)
    unknown: dict[str, None] = {}

    def visit(frame: _Frame, repeated: float) -> None:
        times[frame.computation.name] += repeated
        for one in frame.computation.instructions.values():
            if one.opcode == "while":
                starts[one.name] += repeated
                iterations[one.name] += loop(frame, one, repeated)
            elif one.opcode in _CALLS:
                for name in one.called():
                    inner = program.computations[name]
                    inputs = one.operands if one.opcode != "conditional" else ()
                    values = [_Operand(frame, operand) for operand in inputs]
                    visit(_Frame(program, inner, values), repeated)

    def loop(frame: _Frame, one: Instruction, repeated: float) -> float:
        """Visits the body of a loop, and returns its iterations in all of its runs."""
        turns = _Loop(frame, one)
        known = _TRIPS.search(one.attributes)
        trips = int(known[1]) if known else turns.count()
        if trips is None:
            unknown[one.name] = None
            trips = 1
        nested = _has_loop(program, turns.body)
        done = 0
        while done < trips:
            inside = turns.fresh(done)
            # An iteration whose inner loops do not depend on the counter stands for all.
            if nested:
                before = dict(times), dict(iterations), dict(starts)
                visit(inside, repeated)
                if not inside.varied and done == 0:
                    for total, old in zip((times, iterations, starts), before, strict=True):
                        for name, value in list(total.items()):
                            total[name] += (value - old.get(name, 0.0)) * (trips - 1)
                    break
                done += 1
            else:
                visit(inside, repeated * trips)
                break
        return repeated * trips

    visit(_Frame(program, program.computations[program.entry], []), 1.0)
    trips = {name: iterations[name] / starts[name] for name in starts if starts[name]}
    return Counts(dict(times), trips, tuple(unknown))


def _has_loop(program: Program, computation: Computation) -> bool:
    """Returns whether a computation holds a loop, itself or in a computation that it calls."""
    return any(
        one.opcode == "while"
        or (
            one.opcode in _CALLS
            and any(_has_loop(program, program.computations[name]) for name in one.called())
        )
        for one in computation.instructions.values()
    )


class _Elements:
    """Tuple that a loop's body gets, whose elements are evaluated one by one."""

    def __init__(self, element: Callable[[int], Value]) -> None:
        self.element = element


class _Operand:
    """Operand that a called computation gets, which is evaluated when it is asked for."""

    def __init__(self, frame: "_Frame", name: str) -> None:
        self.frame, self.name = frame, name

    def value(self) -> Value:
        return self.frame.value(self.name)

    def element(self, index: int) -> Value:
        return self.frame.element(self.name, index)


_Input = _Operand | _Elements


class _Frame:
    """One run of a computation, whose values are evaluated when they are asked for.

    `varied` tells whether a value was asked for that changes from iteration to iteration.
    """

    def __init__(
        self,
        program: Program,
        computation: Computation,
        inputs: Sequence[_Input],
        changing: Callable[[int], bool] | None = None,
    ) -> None:
        self.program, self.computation, self.inputs = program, computation, inputs
        self.changing = changing
        self.varied = False
        self.known: dict[str, Value] = {}

    def value(self, name: str) -> Value:
        """Returns the value of an instruction; None if the constants do not tell."""
        if name not in self.known:
            self.known[name] = None
            self.known[name] = self._evaluate(self.computation.instructions[name])
        return self.known[name]

    def element(self, name: str, index: int) -> Value:
        """Returns one element of a tuple, without evaluating the others."""
        one = self.computation.instructions[name]
        if one.opcode == "parameter":
            given = self.inputs[int(one.literal)] if self.inputs else None
            if self.changing is not None and self.changing(index):
                self.varied = True
            return None if given is None else given.element(index)
        if one.opcode == "tuple":
            return self.value(one.operands[index])
        if one.opcode == "while":
            turns = _Loop(self, one)
            trips = turns.count()
            return None if trips is None else turns.element(trips, index)
        if one.opcode in ("fusion", "call"):
            inner = self._inner(one)
            return inner.element(inner.computation.root.name, index)
        value = self.value(name)
        return value[index] if isinstance(value, tuple) and index < len(value) else None

    def _inner(self, one: Instruction) -> "_Frame":
        computation = self.program.computations[one.called()[0]]
        return _Frame(self.program, computation, [_Operand(self, name) for name in one.operands])

    def _evaluate(self, one: Instruction) -> Value:
        if one.opcode == "get-tuple-element":
            return self.element(one.operands[0], int(one.attribute("index") or 0))
        if one.opcode == "parameter":
            number = int(one.literal)
            given = self.inputs[number] if number < len(self.inputs) else None
            return given.value() if isinstance(given, _Operand) else None
        if one.opcode in ("tuple", "while"):
            return None
        # A copy's start also has its operand and a flag as results.
        single = len(one.result) == 1 or one.opcode.endswith("-start")
        if not single or one.result[0].size > _LARGEST:
            return None
        if one.opcode in ("fusion", "call", "async-start"):
            inner = self._inner(one)
            return inner.value(inner.computation.root.name)
        if one.result[0].dtype[:1] not in "sup" and one.opcode != "constant":
            return None
        operation = _OPERATIONS.get(one.opcode)
        if operation is None:
            return None
        values = [self.value(name) for name in one.operands]
        if any(value is None for value in values):
            return None
        try:
            result = operation(one, *values)
        except (ValueError, IndexError, TypeError, OverflowError):
            return None
        dtype = _numpy_type(one.result[0].dtype)
        return None if result is None or dtype is None else np.asarray(result).astype(dtype)


class _Loop:
    """One run of a loop."""

    def __init__(self, frame: _Frame, one: Instruction) -> None:
        self.frame, self.start = frame, one.operands[0]
        names = {
            key: re.search(rf"{key}=%?([\w.\-]+)", one.attributes) for key in ("condition", "body")
        }
        condition, body = names["condition"], names["body"]
        if condition is None or body is None:
            raise ValueError(f"the loop {one.name} has no condition or body")
        self.condition = frame.program.computations[condition[1]]
        self.body = frame.program.computations[body[1]]
        self.known: dict[tuple[int, int], Value] = {}
        self.reached: dict[int, int] = {}
        self.frames: dict[int, _Frame] = {}

    def count(self) -> int | None:
        """Returns the number of iterations; None if the constants do not tell."""
        for turn in range(_MOST_TRIPS):
            going = self._run(self.condition, turn).value(self.condition.root.name)
            if going is None:
                return None
            if not going:
                return turn
        return None

    def element(self, turn: int, index: int) -> Value:
        """Returns an element of the tuple before iteration `turn`."""
        if self._kept(index):
            turn = 0
        for done in range(self.reached.get(index, -1) + 1, turn + 1):
            if done == 0:
                value = self.frame.element(self.start, index)
            else:
                value = self.iteration(done - 1).element(self.body.root.name, index)
            self.known[done, index] = value
            self.reached[index] = done
        return self.known[turn, index]

    def iteration(self, turn: int) -> _Frame:
        """Returns a run of the body."""
        if turn not in self.frames:
            self.frames[turn] = self.fresh(turn)
        return self.frames[turn]

    def fresh(self, turn: int) -> _Frame:
        """Returns a run of the body of which no value has been asked for."""
        return self._run(self.body, turn)

    def _run(self, computation: Computation, turn: int) -> _Frame:
        elements = _Elements(lambda index: self.element(turn, index))
        return _Frame(
            self.frame.program, computation, [elements], lambda index: not self._kept(index)
        )

    def _kept(self, index: int) -> bool:
        """Returns whether the body returns an element as it got it."""
        root = self.body.root
        if root.opcode != "tuple":
            return False
        one = self.body.instructions[root.operands[index]]
        return (
            one.opcode == "get-tuple-element"
            and one.attribute("index") == str(index)
            and self.body.instructions[one.operands[0]].opcode == "parameter"
        )


def _numpy_type(dtype: str) -> Any:
    if dtype == "pred":
        return np.bool_
    match = re.fullmatch(r"([su])(\d+)", dtype)
    if match is None or int(match[2]) < 8:
        return None
    return np.dtype(f"{'int' if match[1] == 's' else 'uint'}{match[2]}")


def _constant(one: Instruction) -> Value:
    if _numpy_type(one.result[0].dtype) is None:
        return None
    words = re.findall(r"true|false|-?\d+", one.literal)
    numbers = [{"true": 1, "false": 0}.get(word) for word in words]
    values = [int(w) if n is None else n for w, n in zip(words, numbers, strict=True)]
    return np.array(values).reshape(one.result[0].shape)


def _compare(one: Instruction, left: Value, right: Value) -> Value:
    operation = {
        "LT": np.less,
        "LE": np.less_equal,
        "GT": np.greater,
        "GE": np.greater_equal,
        "EQ": np.equal,
        "NE": np.not_equal,
    }[one.attribute("direction") or ""]
    return operation(left, right)


def _reshape(one: Instruction, value: Value) -> Value:
    return np.reshape(value, one.result[0].shape)


def _broadcast(one: Instruction, value: Value) -> Value:
    axes = _numbers(one.attribute("dimensions"))
    shape = [1] * len(one.result[0].shape)
    for axis, size in zip(axes, np.shape(value), strict=True):
        shape[axis] = size
    return np.broadcast_to(np.reshape(value, shape), one.result[0].shape)


def _iota(one: Instruction) -> Value:
    shape, axis = one.result[0].shape, int(one.attribute("iota_dimension") or 0)
    line = np.arange(shape[axis]).reshape([-1 if n == axis else 1 for n in range(len(shape))])
    return np.broadcast_to(line, shape)


def _dynamic_slice(one: Instruction, value: Value, *starts: Value) -> Value:
    sizes = _numbers(one.attribute("dynamic_slice_sizes"))
    return value[_window(value.shape, sizes, starts)]


def _dynamic_update(one: Instruction, value: Value, update: Value, *starts: Value) -> Value:
    del one
    result = np.array(value)
    result[_window(value.shape, update.shape, starts)] = update
    return result


def _window(shape: Any, sizes: Any, starts: Any) -> tuple[slice, ...]:
    first = [
        min(max(int(start), 0), whole - size)
        for whole, size, start in zip(shape, sizes, starts, strict=True)
    ]
    return tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))


def _slice(one: Instruction, value: Value) -> Value:
    parts = re.findall(r"\[(\d+):(\d+)(?::(\d+))?\]", one.attributes.partition("}")[0])
    return value[tuple(slice(int(a), int(b), int(c or 1)) for a, b, c in parts)]


def _custom_call(one: Instruction, *values: Value) -> Value:
    del values
    if 'custom_call_target="AllocateBuffer"' in one.attributes:
        return np.zeros(one.result[0].shape, np.int64)
    return None


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def _divide(one: Instruction, left: Value, right: Value) -> Value:
    del one
    left, right = np.asarray(left, object), np.asarray(right, object)
    if np.any(right == 0):
        return None
    return abs(left) // abs(right) * np.sign(left) * np.sign(right)


def _plain(function: Callable[..., Value]) -> Callable[..., Value]:
    return lambda one, *values: function(*values)


_SAME = _plain(lambda value: value)
_OPERATIONS: dict[str, Callable[..., Value]] = {
    "constant": _constant,
    "compare": _compare,
    "reshape": _reshape,
    "bitcast": _reshape,
    "broadcast": _broadcast,
    "iota": _iota,
    "dynamic-slice": _dynamic_slice,
    "dynamic-update-slice": _dynamic_update,
    "slice": _slice,
    "custom-call": _custom_call,
    "divide": _divide,
    "copy": _SAME,
    "copy-start": _SAME,
    "copy-done": _SAME,
    "async-update": _SAME,
    "async-done": _SAME,
    "convert": _SAME,
    "add": _plain(np.add),
    "subtract": _plain(np.subtract),
    "multiply": _plain(np.multiply),
    "remainder": _plain(np.fmod),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "xor": _plain(np.bitwise_xor),
    "not": _plain(np.invert),
    "shift-left": _plain(np.left_shift),
    "shift-right-logical": _plain(np.right_shift),
    "shift-right-arithmetic": _plain(np.right_shift),
    "negate": _plain(np.negative),
    "sign": _plain(np.sign),
    "abs": _plain(np.abs),
    "minimum": _plain(np.minimum),
    "maximum": _plain(np.maximum),
    "clamp": _plain(lambda low, value, high: np.clip(value, low, high)),
    "select": _plain(np.where),
    "partition-id": _plain(lambda: 0),
    "replica-id": _plain(lambda: 0),
}
"""Operations on small integers, by opcode."""
