"""Compiles the step of a run for devices that need not be present, and reports its cost."""

import collections
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_jax.adapters import count_parameters
from peft_jax.cost import Collective, Network, Topology, estimate_program, network_of, read_program
from peft_jax.cost.memory import device_memory
from peft_jax.hub import read_config
from peft_jax.models import CausalLM, build_model
from peft_jax.models.architectures import check_architecture, find_architecture
from peft_jax.parallel import make_mesh
from peft_jax.plan.compiler import CompilerReport, compile_for_topology
from peft_jax.plan.estimate import Estimate
from peft_jax.plan.step_memory import Memory, measure_memory
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.blueprint import Blueprint, draw_blueprint
from peft_jax.training.config import RunConfig
from peft_jax.training.program import step_bytes
from peft_jax.training.step_flops import StepArithmetic, count_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Cost of a run's step on a topology.

    Attributes:
      topology: Devices.
      mesh: Mesh sizes by axis.
      config: Configuration of the run.
      parameters: Number of parameters of model and adapter.
      trainable: Number of trainable parameters.
      fits: Whether the step fits in the devices' memory.
      limit: Usable bytes of a device's memory; None if unknown.
      reason: Why the step does not fit; empty if it does.
      memory: Memory of one device.
      arithmetic: Operations of one step, over all devices.
      collectives: Collectives of one step; None if it did not compile.
      estimate: Estimated time of a step; None if the devices' peak rates are unknown or the step
        did not compile.
      compile_seconds: Seconds of compilation on this machine.
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
        """Returns the plan as nested dictionaries of JSON values, in bytes, FLOPs and seconds."""
        train, execution = self.config.train, self.config.execution
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
            "estimate": None if self.estimate is None else self.estimate.to_mapping(),
            "compile_seconds": round(self.compile_seconds, 1),
        }


def make_plan(config: RunConfig, topology: Topology) -> Plan:
    """Compiles the step of a run for a topology, and returns its cost.

    It reads no weights, data or tokenizer, and downloads nothing. The model's dimensions are those
    of `model.architecture`, or of the `config.json` in the folder `model.path`.

    Raises:
      RefusedError: The configuration is invalid on any device.
    """
    try:
        model = find_model(config)
        mesh = make_mesh(config.parallel, topology.devices)
        blueprint = draw_blueprint(config, model, mesh)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    return plan_blueprint(blueprint, topology)


def find_model(config: RunConfig) -> CausalLM:
    """Builds the model of a configuration, without its checkpoint.

    Raises:
      ValueError: Neither an architecture nor a folder with a `config.json` is given, or they
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
            f"model.path is {config.model.path!r}, but must be a folder, because planning"
            " downloads nothing: set model.architecture, or model.path to a folder with a"
            " config.json"
        )
    return build_model(find_architecture(name), config.execution)


def plan_blueprint(blueprint: Blueprint, topology: Topology) -> Plan:
    """Compiles the step of a blueprint for the topology's devices, and returns its cost."""
    limit = _limit(topology)
    started = time.perf_counter()
    if topology.described:
        report = compile_for_topology(blueprint.config, blueprint.model, topology.name)
    else:
        report = _compile_here(blueprint)
    seconds = time.perf_counter() - started
    program = read_program(report.program) if report.program else None
    memory, reason = measure_memory(blueprint, report.total, program), report.out_of_memory
    if memory.total is not None and limit is not None and memory.total > limit:
        reason = f"it needs {gib(memory.total)} on a device, but a device has {gib(limit)}"
    arithmetic = count_step(blueprint)
    timeline = None
    if program is not None:
        timeline = estimate_program(
            program, chip=topology.chip, network=_network(blueprint, topology)
        )
    estimate = None
    if topology.chip is not None and timeline is not None:
        rate = arithmetic.total / len(topology.devices) / topology.chip.flops
        estimate = Estimate(timeline=timeline, utilization=rate / timeline.total)
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
        collectives=None if timeline is None else timeline.collectives,
        estimate=estimate,
        compile_seconds=seconds,
    )


def _limit(topology: Topology) -> int | None:
    if topology.described:
        return topology.chip.memory if topology.chip else None
    memory = device_memory()
    if memory is None or topology.devices[0].platform != "cpu":
        return memory
    # All CPU devices share the host's memory.
    return memory // len(topology.devices)


def _compile_here(blueprint: Blueprint) -> CompilerReport:
    """Compiles the step for the devices of this machine."""
    compiled = blueprint.trace_step().lower().compile()
    return CompilerReport(
        program=compiled.as_text() or "", total=step_bytes(compiled), out_of_memory=""
    )


def _network(blueprint: Blueprint, topology: Topology) -> Network:
    """Returns the links among the devices of a mesh."""
    return network_of(
        list(blueprint.mesh.devices.flat),
        topology.name.partition(":")[0],
        topology.chip.per_chip if topology.chip else 1,
        topology.slices,
    )


def collective_bytes(found: Sequence[Collective]) -> dict[str, float]:
    """Returns the bytes that a device receives in a step, by kind; between slices separately."""
    total: dict[str, float] = collections.defaultdict(float)
    for one in found:
        total[f"{one.kind} between slices" if one.between_slices else one.kind] += one.total
    return dict(sorted(total.items()))


def gib(size: float | int) -> str:
    """Returns a size in GiB.

    Example:
      >>> gib(3 * 2**29)
      '1.50 GiB'
    """
    return f"{size / 2**30:.2f} GiB"
