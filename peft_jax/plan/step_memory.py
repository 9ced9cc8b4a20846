"""Measures the memory of a step on one device, by kind."""

import dataclasses
from typing import Any

import jax

from peft_jax.core import Tree
from peft_jax.cost import Program
from peft_jax.cost.memory import arrays_on_a_device, bytes_of
from peft_jax.cost.saved import find_saved
from peft_jax.data import AnyBatch
from peft_jax.models.layer_types import find_segments
from peft_jax.parallel import on_mesh
from peft_jax.training.blueprint import Blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
      base: Frozen parameters of the base model.
      adapters: Trainable arrays, and constants of an adapter.
      optimizer: Optimizer state.
      activations: Activations that the layers save for the backward pass.
      temporaries: All other memory while the step runs: gradients, gathered weights and
        intermediate results; None if the compiler does not report a total.
      host: Activations offloaded to host memory.
      total: Peak memory that the compiler reports; None if it does not.
    """

    base: int
    adapters: int
    optimizer: int
    activations: int
    temporaries: int | None
    host: int
    total: int | None


def measure_memory(blueprint: Blueprint, total: int | None, program: Program | None) -> Memory:
    """Returns the memory of a step by kind.

    The compiler only reports a total. Activations are what the compiled program's loop over the
    layers leaves for the backward pass, as it is sharded. Without such loops, they are counted from
    the traced step, as if sharded evenly over all devices. The remainder is temporaries.

    Args:
      blueprint: Blueprint of the run.
      total: Peak memory of a device that the compiler reports, in bytes; None if it does not.
      program: Compiled step; None if it does not fit.
    """
    layers = _scanned(blueprint.model.config)
    saved = None if program is None else find_saved(program, layers=layers)
    kept, offloaded = (saved.device, saved.host) if saved else _kept(blueprint)
    parts = {
        "base": arrays_on_a_device(blueprint.frozen),
        "adapters": arrays_on_a_device(
            {"trainable": blueprint.state.trainable, "constant": blueprint.constant}
        ),
        "optimizer": arrays_on_a_device({"state": blueprint.state.opt_state}),
    }
    held = sum(parts.values())
    if total is not None:
        kept = min(kept, max(total - held, 0))
    return Memory(
        **parts,
        activations=kept,
        temporaries=None if total is None else max(total - held - kept, 0),
        host=offloaded,
        total=total,
    )


def _scanned(config: Any) -> int:
    """Returns the number of layers in the longest loop, if it runs one at a time; else all."""
    kinds = getattr(config, "layers", (None,) * config.num_layers)
    longest = max(find_segments(kinds), key=lambda one: one.period * one.repeats)
    return longest.repeats if longest.period == 1 else config.num_layers


def _kept(blueprint: Blueprint) -> tuple[int, int]:
    """Returns the bytes that one microbatch saves for the backward pass on device and on host."""
    step = blueprint.train_step()

    def left(trainable: Tree, frozen: Tree, constant: Tree, rows: AnyBatch) -> list[Any]:
        _, pull_back = jax.vjp(lambda t: step.loss(t, frozen, constant, rows), trainable)
        return jax.tree.leaves(pull_back)

    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blueprint.batch)
    with on_mesh(blueprint.mesh):
        jaxpr = jax.make_jaxpr(left)(
            blueprint.state.trainable, blueprint.frozen, blueprint.constant, rows
        ).jaxpr
    given = set(map(id, (*jaxpr.invars, *jaxpr.constvars)))
    kept = {id(v): v.aval for v in jaxpr.outvars if id(v) not in given}
    sizes = {True: 0, False: 0}
    for aval in kept.values():
        on_host = "host" in str(getattr(aval, "memory_space", "")).lower()
        sizes[on_host] += bytes_of(aval.shape, aval.dtype) // blueprint.mesh.size
    return sizes[False], sizes[True]
