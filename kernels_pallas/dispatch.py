"""Which implementation of a kernel runs: decided in one place, said once in the log, never silent.

A kernel is made of operations. An `Operation` has an XLA form, which runs anywhere, and may have a
Pallas kernel for TPUs and one for GPUs. It is one primitive to JAX: which of them it becomes is
decided when a program is lowered, by the platform it is lowered *for*. So a training step that is
compiled for a TPU pod on a laptop gets the TPU's kernels, and nothing of Pallas is imported or
traced for a program that runs on a CPU.

    auto        a Pallas kernel where there is one for the platform and the shapes, else XLA
    xla         the XLA form
    pallas      the platform's Pallas kernel; an error where there is none
    interpret   the TPU's kernel, interpreted step by step, on any platform: for tests
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

IMPLEMENTATIONS = ("auto", "xla", "pallas", "interpret")
"""What may be asked for."""

_log = logging.getLogger("kernels_pallas")
_requested = contextvars.ContextVar("kernels_pallas_implementation", default="auto")
_interpreter = contextvars.ContextVar[Any]("kernels_pallas_interpreter", default=True)
_PALLAS_PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}


class KernelError(ValueError):
    """A kernel was asked for where it cannot work; the message says why and what would work."""


@contextlib.contextmanager
def using(implementation: str, *, interpreter: Any = True) -> Iterator[None]:
    """Kernels called within that are not told otherwise use this implementation.

    It is read while a function is traced: a function that `jax.jit` has compiled keeps what it was
    traced with.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      interpreter: what "interpret" gives `pallas_call` as `interpret`: True for Pallas's plain
        interpreter, or `pltpu.InterpretParams`, which simulates a TPU's memories and can look for
        races, but not within `jax.checkpoint`.

    Raises:
      ValueError: the implementation is not known.

    Example:
      >>> with using("xla"):
      ...     print(resolve(None))
      xla
    """
    tokens = _requested.set(_known(implementation)), _interpreter.set(interpreter)
    try:
        yield
    finally:
        _requested.reset(tokens[0])
        _interpreter.reset(tokens[1])


def resolve(implementation: str | None) -> str:
    """What is asked for: the explicit choice, else that of the innermost `using`, else "auto".

    Raises:
      ValueError: the choice is none of `IMPLEMENTATIONS`.
    """
    return _requested.get() if implementation is None else _known(implementation)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Operation:
    """One product, in several implementations that compute the same; a primitive to JAX.

    All functions take the operation's arrays in order, then its settings by name, and return a
    tuple of arrays. It has no derivative of its own: a kernel's `vjp` module makes it one.

    Attributes:
      name: what it is called in the log, and in a program's text.
      xla: the form that runs anywhere. The shapes and dtypes of its results are the operation's.
      tpu: the Pallas kernel for TPUs; takes `interpret`, for `pallas_call`, beside. Called only
        where it is lowered or interpreted, so that what it imports of Pallas costs others nothing.
      gpu: the Pallas kernel for GPUs.
      refuse: given the platform ("tpu" or "gpu"), the arrays' shapes and the settings by name, the
        reason why the kernel there cannot take them, or None.
      hesitate: likewise, the reason why the kernel there, although it could, is not taken by
        "auto", or None.
      rowwise: which arrays are rows of activations, if the results are too: under `jax.vmap` over
        those arrays alone, the mapped axis becomes one more axis of rows. Other mapped calls are
        made one after another.
    """

    name: str
    xla: Callable[..., tuple[jax.Array, ...]]
    tpu: Callable[..., tuple[jax.Array, ...]] | None = None
    gpu: Callable[..., tuple[jax.Array, ...]] | None = None
    refuse: Callable[..., str | None] = lambda platform, *shapes, **settings: None
    hesitate: Callable[..., str | None] = lambda platform, *shapes, **settings: None
    rowwise: tuple[int, ...] = ()

    def __call__(self, *arrays: Any, implementation: str, **settings: Any) -> tuple[jax.Array, ...]:
        """The results.

        Args:
          arrays: in order.
          implementation: one of `IMPLEMENTATIONS`.
          settings: hashable, by name.

        Raises:
          KernelError: when lowered, if what is asked for cannot work there.
        """
        if _known(implementation) == "interpret":
            return self._interpret(*arrays, **settings)
        found = _operation.bind(
            *arrays,
            operation=self,
            implementation=implementation,
            settings=tuple(sorted(settings.items())),
        )
        return tuple(found)

    def _interpret(self, *arrays: Any, **settings: Any) -> tuple[jax.Array, ...]:
        """The TPU's kernel, interpreted; as it is traced, since its effects must be seen by JAX."""
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)
        choice = choose(self, "interpret", shapes, settings, platform="tpu", parts=1)
        say_once(_report(self, shapes, settings, "any platform", choice))
        return _kernel(self, "tpu")(*arrays, interpret=_interpreter.get(), **settings)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation runs, and why."""

    implementation: str
    why: str


def choose(
    operation: Operation,
    requested: str,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    settings: dict[str, Any],
    *,
    platform: str,
    parts: int,
) -> Choice:
    """What an operation becomes when it is lowered.

    Args:
      operation: the operation.
      requested: one of `IMPLEMENTATIONS`.
      shapes: of its arrays.
      settings: of its call.
      platform: what it is lowered for, as JAX calls it.
      parts: over how many devices the compiler is to spread it by itself, which it cannot do with
        a Pallas kernel; 1 within `jax.shard_map`.

    Raises:
      KernelError: what is asked for cannot work there.
    """
    if requested == "xla":
        return Choice("xla", "it was asked for")
    target = "tpu" if requested == "interpret" else _PALLAS_PLATFORMS.get(platform)
    obstacle = _obstacle(operation, target, shapes, settings, platform=platform, parts=parts)
    if obstacle is None and requested == "auto":
        obstacle = operation.hesitate(target, *shapes, **settings)
    if requested == "auto":
        if obstacle is not None:
            return Choice("xla", obstacle)
        return Choice("pallas", f"the default on {platform}")
    if obstacle is not None:
        raise KernelError(
            f"{_describe(operation, shapes, settings)} cannot run as {requested!r} on {platform}: "
            f"{obstacle}. 'auto' and 'xla' work there"
        )
    return Choice(requested, "it was asked for")


def _obstacle(
    operation: Operation,
    target: str | None,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    settings: dict[str, Any],
    *,
    platform: str,
    parts: int,
) -> str | None:
    """Why the target's Pallas kernel cannot be taken; None if it can."""
    kernel = None if target is None else getattr(operation, target)
    if target is None or kernel is None:
        return f"there is no Pallas kernel of it for {platform}"
    if parts > 1:
        return (
            f"its arrays are spread over {parts} devices and nothing says how (the compiler cannot "
            "spread a Pallas kernel itself; see kernels_pallas.layout)"
        )
    return operation.refuse(target, *shapes, **settings)


def _known(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    return implementation


def _describe(
    operation: Operation, shapes: tuple[jax.ShapeDtypeStruct, ...], settings: dict[str, Any]
) -> str:
    arrays = ", ".join(f"{s.dtype.name}{list(s.shape)}" for s in shapes)
    given = "".join(f", {name}={value}" for name, value in settings.items() if value is not None)
    return f"{operation.name}({arrays}{given})"


def _report(
    operation: Operation,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    settings: dict[str, Any],
    platform: str,
    choice: Choice,
) -> str:
    what = _describe(operation, shapes, settings)
    return f"{what} on {platform}: {choice.implementation}, because {choice.why}"


def report_xla(name: str, *arrays: jax.Array) -> None:
    """Says in the log that XLA's form runs because it was asked for by name."""
    shapes = ", ".join(f"{a.dtype.name}{list(a.shape)}" for a in arrays)
    say_once(f"{name}({shapes}) on any platform: xla, because it was asked for")


@functools.lru_cache(maxsize=4096)
def say_once(message: str) -> None:
    """A line in the log, the first time it is said."""
    _log.info(message)


# The primitive.

_operation = Primitive("kernels_pallas")
_operation.multiple_results = True


def _abstract(*avals: Any, operation: Operation, implementation: str, settings: tuple) -> list[Any]:
    del implementation
    results = jax.eval_shape(functools.partial(operation.xla, **dict(settings)), *avals)
    return [
        jax.core.ShapedArray(
            r.shape, r.dtype, sharding=r.sharding, manual_axis_type=avals[0].manual_axis_type
        )
        for r in results
    ]


def _run(*arrays: Any, **params: Any) -> list[jax.Array]:
    """Outside of `jax.jit`."""
    return _compiled(tuple(sorted(params.items(), key=lambda item: item[0])))(*arrays)


@functools.lru_cache(maxsize=256)
def _compiled(params: tuple) -> Callable[..., list[jax.Array]]:
    return jax.jit(lambda *arrays: _operation.bind(*arrays, **dict(params)))


def _lower(ctx: mlir.LoweringRuleContext, *values: Any, platform: str | None, **params: Any) -> Any:
    operation, settings = params["operation"], dict(params["settings"])
    avals: Any = ctx.avals_in
    shapes = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
    if platform is None:
        platform = "/".join(ctx.module_context.platforms)
    choice = choose(
        operation,
        params["implementation"],
        shapes,
        settings,
        platform=platform,
        parts=_parts(ctx.module_context.axis_context),
    )
    say_once(_report(operation, shapes, settings, platform, choice))
    if choice.implementation == "xla":
        chosen = operation.xla
    elif platform == "tpu":
        chosen = functools.partial(_kernel(operation, "tpu"), interpret=False)
    else:
        chosen = _kernel(operation, "gpu")
    return mlir.lower_fun(functools.partial(chosen, **settings), multiple_results=True)(
        ctx, *values
    )


def _kernel(operation: Operation, target: str) -> Callable[..., tuple[jax.Array, ...]]:
    kernel = getattr(operation, target)
    assert kernel is not None, "choose() has seen that there is one"
    return kernel


def _parts(axis_context: Any) -> int:
    """Over how many devices the compiler is left to spread what is being lowered."""
    if isinstance(axis_context, mlir.ShardingContext):
        return axis_context.num_devices
    if isinstance(axis_context, mlir.SPMDAxisContext):
        mesh = axis_context.mesh
        manual = set(axis_context.manual_axes) | set(mesh.manual_axes)
        left = [size for name, size in mesh.shape.items() if name not in manual]
        return functools.reduce(int.__mul__, left, 1)
    return 1


def _batch(arrays: tuple, axes: tuple, **params: Any) -> tuple[list[jax.Array], list[int]]:
    operation = params["operation"]
    mapped = [index for index, axis in enumerate(axes) if axis is not None]
    moved = [
        array if axis is None else jax.numpy.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    if tuple(mapped) == operation.rowwise:
        results = _operation.bind(*moved, **params)
    else:

        def one(slices: list[jax.Array]) -> list[jax.Array]:
            given = dict(zip(mapped, slices, strict=True))
            return _operation.bind(*(given.get(i, a) for i, a in enumerate(moved)), **params)

        results = jax.lax.map(one, [moved[index] for index in mapped])
    return results, [0] * len(results)


_operation.def_impl(_run)
_operation.def_abstract_eval(_abstract)
batching.primitive_batchers[_operation] = _batch
mlir.register_lowering(_operation, functools.partial(_lower, platform=None))
for _platform in _PALLAS_PLATFORMS:
    mlir.register_lowering(
        _operation, functools.partial(_lower, platform=_platform), platform=_platform
    )
