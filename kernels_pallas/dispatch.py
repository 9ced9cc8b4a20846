"""Chooses which implementation of a kernel runs, and logs each choice once with its reason.

An `Operation` has an XLA form, which runs anywhere, and may have a Pallas kernel for TPUs and one
for GPUs. JAX sees it as one primitive. The implementation is chosen when a program is lowered, by
the platform it is lowered *for*. So a training step compiled for a TPU pod on a laptop contains the
TPU kernels, and a program for a CPU neither imports nor traces anything of Pallas.

    auto        the Pallas kernel if the platform has one that supports the operands, else XLA
    xla         the XLA form
    pallas      the platform's Pallas kernel, or an error if there is none
    interpret   the TPU kernel, interpreted step by step on any platform, for tests
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

IMPLEMENTATIONS = ("auto", "xla", "pallas", "interpret")
"""Implementations that a caller can request."""

_log = logging.getLogger("kernels_pallas")
_requested = contextvars.ContextVar("kernels_pallas_implementation", default="auto")
_interpreter = contextvars.ContextVar[Any]("kernels_pallas_interpreter", default=True)
_PALLAS_PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}


class KernelError(ValueError):
    """The requested implementation cannot run; the message gives the reason and alternatives."""


@contextlib.contextmanager
def use_implementation(implementation: str, *, interpreter: Any = True) -> Iterator[None]:
    """Sets the default implementation of the kernels called within.

    The default is read while a function is traced. A function that `jax.jit` has already compiled
    keeps the implementation it was traced with.

    Args:
      implementation: One of `IMPLEMENTATIONS`.
      interpreter: The `interpret` argument of `pallas_call` for "interpret". True selects Pallas's
        plain interpreter. `pltpu.InterpretParams` simulates a TPU's memories and can detect races,
        but does not work under `jax.checkpoint`.

    Raises:
      ValueError: `implementation` is unknown.

    Example:
      >>> with use_implementation("xla"):
      ...     print(resolve(None))
      xla
    """
    tokens = _requested.set(_checked(implementation)), _interpreter.set(interpreter)
    try:
        yield
    finally:
        _requested.reset(tokens[0])
        _interpreter.reset(tokens[1])


def __getattr__(name: str) -> Any:
    """Returns `use_implementation` under its name in version 0.1, with a warning."""
    if name == "using":
        warnings.warn(
            "kernels_pallas.dispatch.using is now use_implementation; the old name goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return use_implementation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def resolve(implementation: str | None) -> str:
    """Returns `implementation`, or if None that of the innermost `use_implementation`, or "auto".

    Raises:
      ValueError: `implementation` is not one of `IMPLEMENTATIONS`.
    """
    return _requested.get() if implementation is None else _checked(implementation)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Operation:
    """One JAX primitive with several implementations that compute the same results.

    Every implementation takes the operation's arrays by position and its settings by name, and
    returns a tuple of arrays. An operation has no derivative; `kernels_pallas.product` adds one.

    Attributes:
      name: Name in the log and in a program's text.
      xla: The form that runs anywhere. It determines the shapes and dtypes of the results.
      tpu: The Pallas kernel for TPUs, which also takes `interpret` for `pallas_call`. It is called
        only where it is lowered or interpreted, so its Pallas imports cost nothing elsewhere.
      gpu: The Pallas kernel for GPUs.
      unsupported: Returns why a kernel cannot run, or None if it can. Takes the kernel's platform
        ("tpu" or "gpu"), the shapes of the arrays, and the settings by name.
      rowwise: Indices of the arrays that are rows of activations, if all results are rows too.
        `jax.vmap` over exactly these arrays adds an axis of rows. Other mapped calls run one after
        another.
    """

    name: str
    xla: Callable[..., tuple[jax.Array, ...]]
    tpu: Callable[..., tuple[jax.Array, ...]] | None = None
    gpu: Callable[..., tuple[jax.Array, ...]] | None = None
    unsupported: Callable[..., str | None] = lambda platform, *shapes, **settings: None
    rowwise: tuple[int, ...] = ()

    def __call__(self, *arrays: Any, implementation: str, **settings: Any) -> tuple[jax.Array, ...]:
        """Runs the operation.

        Args:
          arrays: Operands in order.
          implementation: One of `IMPLEMENTATIONS`.
          settings: Hashable settings by name.

        Raises:
          KernelError: While lowering, if the requested implementation cannot run.
        """
        if _checked(implementation) == "interpret":
            return self._interpret(*arrays, **settings)
        results = _operation.bind(
            *arrays,
            operation=self,
            implementation=implementation,
            settings=tuple(sorted(settings.items())),
        )
        return tuple(results)

    def _interpret(self, *arrays: Any, **settings: Any) -> tuple[jax.Array, ...]:
        """Interprets the TPU kernel while tracing, because JAX must see the kernel's effects."""
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)
        choice = choose(self, "interpret", shapes, settings, platform="tpu", devices=1)
        log_once(_log_line(self.name, shapes, settings, "any platform", choice))
        return _kernel(self, "tpu")(*arrays, interpret=_interpreter.get(), **settings)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reason."""

    implementation: str
    reason: str


def choose(
    operation: Operation,
    requested: str,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    settings: dict[str, Any],
    *,
    platform: str,
    devices: int,
) -> Choice:
    """Chooses the implementation that an operation is lowered to.

    Args:
      operation: The operation.
      requested: One of `IMPLEMENTATIONS`.
      shapes: Shapes of its arrays.
      settings: Settings of the call.
      platform: Platform that the program is lowered for, by JAX's name.
      devices: Number of devices over which the compiler partitions the operation itself, which it
        cannot do for a Pallas kernel. Within `jax.shard_map` this is 1.

    Raises:
      KernelError: The requested implementation cannot run.
    """
    if requested == "xla":
        return Choice("xla", "requested")
    target = "tpu" if requested == "interpret" else _PALLAS_PLATFORMS.get(platform)
    obstacle = _obstacle(operation, target, shapes, settings, platform=platform, devices=devices)
    if requested == "auto":
        if obstacle is not None:
            return Choice("xla", obstacle)
        return Choice("pallas", f"default on {platform}")
    if obstacle is not None:
        raise KernelError(
            f"{_describe(operation.name, shapes, settings)} cannot run as {requested!r} on"
            f" {platform}: {obstacle}. Use 'auto' or 'xla'"
        )
    return Choice(requested, "requested")


def _obstacle(
    operation: Operation,
    target: str | None,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    settings: dict[str, Any],
    *,
    platform: str,
    devices: int,
) -> str | None:
    """Returns why the target's Pallas kernel cannot run; None if it can."""
    kernel = None if target is None else getattr(operation, target)
    if target is None or kernel is None:
        return f"no Pallas kernel for {platform}"
    if devices > 1:
        return (
            f"operands span {devices} devices in an unknown layout, and the compiler cannot"
            " partition a Pallas kernel; see kernels_pallas.layout"
        )
    return operation.unsupported(target, *shapes, **settings)


def _checked(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r} but must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    return implementation


def _describe(name: str, shapes: tuple[jax.ShapeDtypeStruct, ...], settings: dict[str, Any]) -> str:
    operands = ", ".join(f"{s.dtype.name}{list(s.shape)}" for s in shapes)
    given = "".join(f", {name}={value}" for name, value in settings.items() if value is not None)
    return f"{name}({operands}{given})"


def _log_line(
    name: str,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    settings: dict[str, Any],
    platform: str,
    choice: Choice,
) -> str:
    call = _describe(name, shapes, settings)
    return f"{call} on {platform}: {choice.implementation} ({choice.reason})"


def log_requested_xla(name: str, *arrays: jax.Array) -> None:
    """Logs that XLA's form of an operation runs because the caller requested it."""
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)
    log_once(_log_line(name, shapes, {}, "any platform", Choice("xla", "requested")))


@functools.lru_cache(maxsize=4096)
def log_once(message: str) -> None:
    """Logs a message the first time that it is given."""
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
    """Runs an operation outside `jax.jit`."""
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
        devices=_devices(ctx.module_context.axis_context),
    )
    log_once(_log_line(operation.name, shapes, settings, platform, choice))
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
    assert kernel is not None, "choose() has checked that there is a kernel"
    return kernel


def _devices(axis_context: Any) -> int:
    """Returns the number of devices over which the compiler partitions what is being lowered."""
    if isinstance(axis_context, mlir.ShardingContext):
        return axis_context.num_devices
    if isinstance(axis_context, mlir.SPMDAxisContext):
        mesh = axis_context.mesh
        manual = set(axis_context.manual_axes) | set(mesh.manual_axes)
        return math.prod(size for name, size in mesh.shape.items() if name not in manual)
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
