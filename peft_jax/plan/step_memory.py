"""What a step holds on one device, by kind."""

import dataclasses
from typing import Any

import jax

from peft_jax.core import Tree
from peft_jax.cost.memory import arrays_on_a_device, bytes_of
from peft_jax.data import AnyBatch
from peft_jax.parallel import on_mesh
from peft_jax.training.blueprint import Blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    Attributes:
      base: the frozen base's parameters.
      adapters: what is trained, and an adapter's constants.
      optimizer: the optimizer's state.
      activations: what the backward pass keeps of the forward pass.
      temporaries: all else that the step needs while it runs: gradients, gathered weights, and
        what is computed on the way; None where the compiler does not say.
      host: waiting in the host's memory.
      total: the most that is held at a time, as the compiler lays it out; None likewise.
    """

    base: int
    adapters: int
    optimizer: int
    activations: int
    temporaries: int | None
    host: int
    total: int | None


def measure_memory(blueprint: Blueprint, total: int | None) -> Memory:
    """The memory of a step by kind.

    The compiler gives one number for everything. What the backward pass keeps is counted from the
    step's program and taken as cut evenly over all devices, as the activations' shardings have it;
    what is then left is temporaries.

    Args:
      blueprint: the run's.
      total: what the compiler says that the step takes on a device; None where it did not say.
    """
    kept, offloaded = _kept(blueprint)
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


def _kept(blueprint: Blueprint) -> tuple[int, int]:
    """What one microbatch's forward pass leaves on a device, and on its host, for the backward."""
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
