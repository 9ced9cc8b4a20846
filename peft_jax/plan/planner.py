"""Compiling the step of a run for devices that need not be there, and what comes of it."""

import collections
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_jax.adapters import count_parameters
from peft_jax.cost import Collective, Topology, read_collectives
from peft_jax.cost.memory import arrays_on_a_device, device_memory
from peft_jax.hub import read_config
from peft_jax.models import CausalLM, build_model
from peft_jax.models.architectures import check_architecture, find_architecture
from peft_jax.parallel import make_mesh
from peft_jax.plan.compiler import Decisions, ask_compiler
from peft_jax.plan.estimate import Estimate, estimate_step
from peft_jax.plan.step_memory import Memory, measure_memory
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.blueprint import Blueprint, draw_blueprint
from peft_jax.training.config import RunConfig
from peft_jax.training.program import step_bytes
from peft_jax.training.step_flops import StepArithmetic, count_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run's step takes on a topology.

    Attributes:
      topology: the devices.
      mesh: how they are arranged, by axis.
      config: the run's configuration.
      parameters: the model's, and of them how many numbers are trained.
      trainable: how many numbers are trained.
      fits: whether the step fits into the devices' memory.
      limit: what a program may use of a device's memory, bytes; None where it is not known.
      reason: why it does not fit, in the compiler's words; empty where it does.
      memory: on one device.
      arithmetic: of one step, over all devices.
      collectives: of one step; None where it did not compile.
      estimate: of a step's time; None where nothing is known of the devices' speed, or it did not
        compile.
      compile_seconds: how long compiling took here.
    """

    topology: Topology
    mesh: dict[str, int]
    config: RunConfig
    parameters: int
    trainable: int
    fits: bool
    limit: int | None
    reason: str
    memory: Memory
    arithmetic: StepArithmetic
    collectives: tuple[Collective, ...] | None
    estimate: Estimate | None
    compile_seconds: float

    def to_mapping(self) -> dict[str, Any]:
        """The plan as nested dictionaries that JSON can hold; bytes, FLOPs and seconds."""
        train, execution = self.config.train, self.config.execution
        estimate = None
        if self.estimate is not None:
            estimate = dataclasses.asdict(self.estimate) | {
                "seconds": self.estimate.seconds,
                "bound_by": self.estimate.bound_by,
            }
        return {
            "fits": self.fits,
            "reason": self.reason,
            "model": self.config.model.architecture or self.config.model.path,
            "method": self.config.spec.method.name,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "devices": len(self.topology.devices),
            "mesh": self.mesh,
            "batch_size": train.batch_size,
            "gradient_accumulation": train.gradient_accumulation,
            "max_length": train.max_length,
            "remat": execution.remat,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "memory_a_device": dataclasses.asdict(self.memory) | {"limit": self.limit},
            "flops_a_step": dataclasses.asdict(self.arithmetic) | {"total": self.arithmetic.total},
            "collective_bytes_a_device": None
            if self.collectives is None
            else collective_bytes(self.collectives),
            "estimate": estimate,
            "compile_seconds": round(self.compile_seconds, 1),
        }


def make_plan(config: RunConfig, topology: Topology) -> Plan:
    """Compiles the step of a run for a topology, and says what it takes.

    No weights are read, no data and no tokenizer, and nothing is downloaded: the model's dimensions
    are those of `model.architecture`, or of the `config.json` in the folder `model.path`.

    Raises:
      RefusedError: the run cannot be done as it is configured, wherever.
    """
    try:
        model = find_model(config)
        mesh = make_mesh(config.parallel, topology.devices)
        blueprint = draw_blueprint(config, model, mesh)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    return plan_blueprint(blueprint, topology)


def find_model(config: RunConfig) -> CausalLM:
    """The model of a configuration, without its checkpoint.

    Raises:
      ValueError: neither an architecture nor a folder with a `config.json` is given, or they
        disagree.
    """
    name, folder = config.model.architecture, Path(config.model.path).expanduser()
    if folder.is_dir():
        model = build_model(read_config(folder), config.execution)
        if name:
            check_architecture(name, model.config)
        return model
    if not name:
        raise ValueError(
            f"model.path {config.model.path!r} is no folder, and planning downloads nothing: set "
            "model.architecture to a known one, or model.path to a folder with a config.json"
        )
    return build_model(find_architecture(name), config.execution)


def plan_blueprint(blueprint: Blueprint, topology: Topology) -> Plan:
    """Compiles the step of a blueprint, drawn for the topology's devices."""
    limit = _limit(topology)
    started = time.perf_counter()
    if topology.described:
        decisions = ask_compiler(blueprint.config, blueprint.model, topology.name)
    else:
        decisions = _compile_here(blueprint)
    seconds = time.perf_counter() - started
    memory, reason = measure_memory(blueprint, decisions.total), decisions.out_of_memory
    if memory.total is not None and limit is not None and memory.total > limit:
        reason = f"it takes {gib(memory.total)} on a device, which has {gib(limit)}"
    arithmetic = count_step(blueprint)
    devices = len(topology.devices)
    collectives = None
    if decisions.program:
        collectives = tuple(
            read_collectives(decisions.program, devices_a_slice=devices // topology.slices)
        )
    estimate = None
    if topology.chip is not None and collectives is not None:
        estimate = estimate_step(
            topology.chip,
            devices=devices,
            arithmetic=arithmetic,
            parameter_bytes=_parameter_bytes(blueprint),
            collectives=collectives,
        )
    count = count_parameters(blueprint.spec, blueprint.params, blueprint.adapter)
    return Plan(
        topology=topology,
        mesh=dict(blueprint.mesh.shape),
        config=blueprint.config,
        parameters=count.total,
        trainable=count.trainable,
        fits=not reason,
        limit=limit,
        reason=reason,
        memory=memory,
        arithmetic=arithmetic,
        collectives=collectives,
        estimate=estimate,
        compile_seconds=seconds,
    )


def _limit(topology: Topology) -> int | None:
    if topology.described:
        return topology.chip.memory if topology.chip else None
    memory = device_memory()
    if memory is None or topology.devices[0].platform != "cpu":
        return memory
    # The CPU's devices share the host's memory.
    return memory // len(topology.devices)


def _compile_here(blueprint: Blueprint) -> Decisions:
    """The step compiled for the devices of this machine."""
    compiled = blueprint.trace_step().lower().compile()
    return Decisions(program=compiled.as_text() or "", total=step_bytes(compiled), out_of_memory="")


def _parameter_bytes(blueprint: Blueprint) -> int:
    """What one device reads of the parameters in a step: gathered along all axes but "tensor"."""
    shape = blueprint.mesh.shape
    gathered = shape["fsdp"]
    own = arrays_on_a_device({"params": blueprint.params}) * gathered
    passes = 2 if blueprint.model.execution.remat == "none" else 3
    return own * passes * blueprint.config.train.gradient_accumulation


def collective_bytes(found: Sequence[Collective]) -> dict[str, float]:
    """Bytes that a device receives in a step, by kind; those between slices by themselves."""
    total: dict[str, float] = collections.defaultdict(float)
    for one in found:
        total[f"{one.kind} between slices" if one.between_slices else one.kind] += one.total
    return dict(sorted(total.items()))


def gib(size: float | int) -> str:
    """Bytes in GiB.

    Example:
      >>> gib(3 * 2**29)
      '1.50 GiB'
    """
    return f"{size / 2**30:.2f} GiB"
