"""Main-memory traffic of a kernel on a TPU, as the TPU compiler reports it, and its lower bound."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas.tpu_compiler import compile_for, runs_pallas


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a compiled program holds in the chip's main memory.

    Attributes:
      arguments: Bytes of arguments, each read at least once.
      results: Bytes of results, each written.
      temporaries: Bytes of temporaries, each written and read back.
    """

    arguments: int
    results: int
    temporaries: int

    @property
    def total(self) -> int:
        """Sum of arguments, results and temporaries."""
        return self.arguments + self.results + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A kernel call to compile.

    Attributes:
      kernel: Name of the kernel.
      case: Description of the operands.
      direction: "forwards" or "backwards".
      function: Takes the arrays and the implementation.
      shapes: Shapes of the arrays.
    """

    kernel: str
    case: str
    direction: str
    function: Callable[..., Any]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def minimum(self) -> int:
        """Bytes moved if every argument and result moves once and nothing else does."""
        results = jax.tree.leaves(
            jax.eval_shape(lambda *arrays: self.function(*arrays, "xla"), *self.shapes)
        )
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in (*self.shapes, *results))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the compiler reports about one program.

    Attributes:
      traffic: Arguments, results and temporaries in main memory.
      accessed: Bytes that all operations read and write together. For a Pallas kernel this is the
        kernel's own cost estimate.
      pallas: Whether the program contains a Pallas kernel.
      seconds: Compile time.
    """

    traffic: Traffic
    accessed: int
    pallas: bool
    seconds: float


def forward_and_backward(
    kernel: str,
    case: str,
    product: Callable[..., jax.Array],
    x: jax.ShapeDtypeStruct,
    *parameters: jax.ShapeDtypeStruct,
) -> list[Program]:
    """Returns the programs of a product and of its gradients.

    Args:
      kernel: Name of the kernel.
      case: Description of the operands.
      product: Maps x and parameters, and the keyword `implementation`, to an array shaped as x.
      x: Shape of the activations.
      parameters: Shapes of the parameters.
    """

    def forwards(x: jax.Array, *rest: Any) -> jax.Array:
        *parameters, implementation = rest
        return product(x, *parameters, implementation=implementation)

    def backwards(x: jax.Array, g: jax.Array, *rest: Any) -> tuple[jax.Array, ...]:
        *parameters, implementation = rest
        _, transpose = jax.vjp(
            lambda *arrays: product(*arrays, implementation=implementation), x, *parameters
        )
        return transpose(g)

    return [
        Program(kernel=kernel, case=case, direction=direction, function=function, shapes=shapes)
        for direction, function, shapes in (
            ("forwards", forwards, (x, *parameters)),
            ("backwards", backwards, (x, x, *parameters)),
        )
    ]


def read_traffic(compiled: jax.stages.Compiled) -> Traffic:
    """Returns what a compiled program holds in main memory."""
    analysis: Any = compiled.memory_analysis()
    return Traffic(
        arguments=int(analysis.argument_size_in_bytes),
        results=int(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        temporaries=int(analysis.temp_size_in_bytes),
    )


def measure(chip: str, program: Program, implementation: str) -> Measurement:
    """Compiles a program for one device of a TPU generation and returns what it moves.

    Args:
      chip: One of `kernels_pallas.tpu_compiler.TOPOLOGIES`.
      program: The program to compile.
      implementation: One of `kernels_pallas.dispatch.IMPLEMENTATIONS`.
    """
    start = time.perf_counter()
    compiled = compile_for(
        chip, lambda *arrays: program.function(*arrays, implementation), *program.shapes
    )
    cost: Any = compiled.cost_analysis() or {}
    return Measurement(
        traffic=read_traffic(compiled),
        accessed=int(cost.get("bytes accessed", 0)),
        pallas=runs_pallas(compiled),
        seconds=time.perf_counter() - start,
    )
