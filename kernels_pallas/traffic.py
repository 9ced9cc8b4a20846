"""What a kernel moves on a TPU, by the word of the TPU's compiler, and the least that it could."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas.tpu_compiler import Traffic, compile_for, runs_pallas, traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Something to compile.

    Attributes:
      kernel: what is called.
      case: its shape, in words.
      direction: "forwards" or "backwards".
      function: of the arrays and the implementation.
      shapes: of the arrays.
    """

    kernel: str
    case: str
    direction: str
    function: Callable[..., Any]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def minimum(self) -> int:
        """Bytes of the arguments and the results, each moved once."""
        results = jax.tree.leaves(
            jax.eval_shape(lambda *arrays: self.function(*arrays, "xla"), *self.shapes)
        )
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in (*self.shapes, *results))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One program, compiled.

    Attributes:
      traffic: arguments, results and temporaries in main memory.
      accessed: bytes that the compiler counts as read and written by all of its operations
        together, a Pallas kernel's by what the kernel states of itself.
      pallas: whether a Pallas kernel is in it.
      seconds: the time it took to compile.
    """

    traffic: Traffic
    accessed: int
    pallas: bool
    seconds: float


def measure(chip: str, program: Program, implementation: str) -> Measured:
    """Compiles a program for one device of a TPU generation.

    Args:
      chip: one of `kernels_pallas.tpu_compiler.TOPOLOGIES`.
      program: what to compile.
      implementation: one of `kernels_pallas.dispatch.IMPLEMENTATIONS`.
    """
    start = time.perf_counter()
    compiled = compile_for(
        chip, lambda *arrays: program.function(*arrays, implementation), *program.shapes
    )
    cost: Any = compiled.cost_analysis() or {}
    return Measured(
        traffic=traffic(compiled),
        accessed=int(cost.get("bytes accessed", 0)),
        pallas=runs_pallas(compiled),
        seconds=time.perf_counter() - start,
    )
