"""Formats a plan as text."""

import textwrap
from collections.abc import Iterable, Sequence

from peft_jax.parallel.mesh import describe_shape
from peft_jax.plan.estimate import ASSUMPTIONS
from peft_jax.plan.planner import Plan, collective_bytes, gib

_WIDTH = 80
"""Width of a terminal, in characters."""


_LEAST_SHARE = 0.001
"""Share of a step below which a part of the model is not listed."""


def describe(plan: Plan) -> str:
    """Returns the plan as text for a terminal."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterable[str]:
    train, execution = plan.config.train, plan.config.execution
    chip = plan.topology.chip
    chips = f"{plan.topology.chips} chips" if plan.topology.described else "this machine"
    per_chip = chip.per_chip if chip else 1
    cores = f", {per_chip} devices each" if per_chip > 1 else ""
    yield (
        f"{plan.config.model.architecture or plan.config.model.path},"
        f" {plan.config.spec.method.name},"
        f" on {plan.topology.name} ({chips}{cores}): {describe_shape(plan.mesh)}"
    )
    yield (
        f"{train.batch_size} rows of {train.max_length} tokens per step, in "
        f"{train.gradient_accumulation} microbatches; remat {execution.remat}"
    )
    yield f"{plan.trainable:,} of {plan.parameters:,} parameters are trainable"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _arithmetic(plan)
    if plan.collectives is not None:
        yield ""
        yield from _collectives(plan)
    yield ""
    yield from _time(plan)
    yield ""
    yield f"compiled in {plan.compile_seconds:.0f} s"
    yield "yes: it fits" if plan.fits else f"no: {plan.reason}"


def _memory(plan: Plan) -> Iterable[str]:
    memory, limit = plan.memory, plan.limit
    rows = [
        ("base", memory.base),
        ("adapters", memory.adapters),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("temporaries", memory.temporaries),
        ("all", memory.total),
        ("limit", limit),
    ]
    if memory.host:
        rows.append(("on the host", memory.host))
    yield "memory per device"
    for name, size in rows:
        share = f"{size / limit:7.1%}" if limit and size is not None else ""
        yield f"  {name:<14}{gib(size) if size is not None else '?':>14}{share}"


def _arithmetic(plan: Plan) -> Iterable[str]:
    arithmetic = plan.arithmetic
    tokens = plan.config.train.batch_size * plan.config.train.max_length
    # `parameters` counts leaves trained in full once, and an adapter's parameters are few.
    per_token = arithmetic.total / tokens / plan.parameters
    yield "operations per step"
    for name, flops in (
        ("base", arithmetic.base),
        ("attention", arithmetic.attention),
        ("adapters", arithmetic.adapters),
        ("all", arithmetic.total),
        ("with remat", arithmetic.computed),
    ):
        yield f"  {name:<14}{flops / 1e12:>14,.2f} TFLOP"
    yield f"  {per_token:.2f} operations per parameter and token"


def _collectives(plan: Plan) -> Iterable[str]:
    yield "received by a device per step"
    found = collective_bytes(plan.collectives or ())
    for kind, size in found.items():
        yield f"  {kind:<28}{gib(size):>14}"
    if not found:
        yield "  nothing"


def _time(plan: Plan) -> Iterable[str]:
    estimate = plan.estimate
    if estimate is None:
        yield "no estimate of the time: " + (
            "the step did not compile"
            if plan.collectives is None
            else "the peak rates of these devices are unknown"
        )
        return
    tokens = plan.config.train.batch_size * plan.config.train.max_length
    timeline = estimate.timeline
    yield (
        f"about {estimate.seconds:.3g} s/step ({tokens / estimate.seconds:,.0f} tokens/s), "
        f"mostly {estimate.bound_by}; utilization {estimate.utilization:.0%}"
    )
    kinds = [kind for kind, seconds in timeline.by_kind().items() if seconds > 0]
    unit, factor = ("seconds", 1.0) if estimate.seconds >= 1 else ("ms", 1e3)
    yield f"  {unit:<12}{'all':>8}" + "".join(f"{kind:>13}" for kind in kinds)
    for name, seconds in (("all", timeline.by_kind()), *timeline.by_part().items()):
        whole = sum(seconds.values())
        if whole >= _LEAST_SHARE * estimate.seconds:
            row = "".join(f"{seconds[kind] * factor:>13.2f}" for kind in kinds)
            yield f"  {name:<12}{whole * factor:>8.2f}{row}"
    yield (
        f"  transfers: {timeline.hidden():.3g} s hidden behind other work,"
        f" {timeline.unhidden():.3g} s not"
    )
    for name in timeline.unknown_loops:
        yield f"  the loop {name} counts once, because its length is computed"
    yield textwrap.fill(
        f"assumed: {'; '.join(ASSUMPTIONS)}",
        width=_WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as a Markdown table; the first row is the header.

    Example:
      >>> print(table([["method", "GiB"], ["lora", "9.6"]]))
      | method | GiB |
      | --- | --- |
      | lora | 9.6 |
    """
    lines = [" | ".join(row).join(("| ", " |")) for row in rows]
    lines.insert(1, " | ".join("---" for _ in rows[0]).join(("| ", " |")))
    return "\n".join(lines)
