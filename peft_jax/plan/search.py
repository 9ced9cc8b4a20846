"""The smallest devices that a run fits on, and how to lay it out there.

Cheap bounds put the layouts in order, and leave out what cannot fit; the compiler has the last
word. On the smallest topology on which anything fits, the fastest of the layouts that were compiled
is taken, by `peft_jax.plan.estimate`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
from qwix import QArray

from peft_jax.core import did_you_mean, flatten
from peft_jax.cost import TOPOLOGIES, Topology, find_topology
from peft_jax.cost.memory import bytes_of
from peft_jax.models import Model
from peft_jax.parallel import MeshSettings
from peft_jax.parallel.mesh import factorizations
from peft_jax.plan.planner import Plan, find_model, make_plan
from peft_jax.runtime.errors import RefusedError
from peft_jax.training.blueprint import optimizer_of
from peft_jax.training.config import RunConfig
from peft_jax.training.state import abstract_state

REMATS = ("none", "dots", "full")
"""From the least that is computed again to the most."""
_LARGEST_TENSOR = 16
"""Beyond it the parts of a product are too small for the sums between them."""
_COMPILED_AT_MOST = 8
_FITTING_ENOUGH = 2
"""On one topology: so many are compiled, until so many fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of laying a run out.

    Attributes:
      mesh: the devices.
      microbatches: into how many a step's rows are cut.
      remat: what the backward pass keeps.
      least_bytes: what it takes on a device at the very least.
      cost: in no unit, for putting layouts in order; the less the faster.
    """

    mesh: MeshSettings
    microbatches: int
    remat: str
    least_bytes: float
    cost: float

    def apply(self, config: RunConfig) -> RunConfig:
        """The configuration, laid out like this."""
        return dataclasses.replace(
            config,
            parallel=self.mesh,
            train=dataclasses.replace(config.train, gradient_accumulation=self.microbatches),
            execution=dataclasses.replace(config.execution, remat=self.remat),
        )

    def flags(self) -> str:
        """The flags that lay a run out like this."""
        sizes = {**{axis: n for axis, n in self.mesh.sizes.items() if n != 1}}
        sizes.setdefault("data", 1)
        flags = [f"--config.parallel.{axis}={size}" for axis, size in sizes.items()]
        flags.append(f"--config.train.gradient_accumulation={self.microbatches}")
        flags.append(f"--config.execution.remat={self.remat}")
        return " ".join(flags)


def search(
    config: RunConfig, name: str, *, say: Callable[[str], None] = lambda message: None
) -> tuple[Plan, Layout | None]:
    """The plan on the smallest topology of a kind, by the best layout there.

    Args:
      config: the run; its mesh, microbatches and rematerialization are what is searched for.
      name: a kind of TPU, "v5p", whose sizes are tried from the smallest; or one topology, or
        "cpu" or "gpu", to find a layout for.
      say: told of each layout that is compiled.

    Returns:
      The plan and its layout. If nothing fits, what was compiled last, and None.

    Raises:
      RefusedError: the name is not known, or no topology can divide the model and the batch.
    """
    last: Plan | None = None
    try:
        model = find_model(config)
        sizes = _Sizes.of(config, model)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    for topology in _topologies(name):
        fitting: list[tuple[Plan, Layout]] = []
        for layout in _layouts(config, model, sizes, topology)[:_COMPILED_AT_MOST]:
            say(f"{topology.name}: {layout.flags()}")
            last = make_plan(layout.apply(config), topology)
            say(f"  {_outcome(last)}")
            if last.fits:
                fitting.append((last, layout))
            if len(fitting) == _FITTING_ENOUGH:
                break
        if fitting:
            return min(fitting, key=lambda pair: _seconds(pair[0]))
    if last is None:
        raise RefusedError(
            f"no layout of this run on {name} can fit, by its arrays' sizes alone, or divides the "
            f"model and train.batch_size {config.train.batch_size}"
        )
    return last, None


def _outcome(plan: Plan) -> str:
    if not plan.fits:
        return f"no: {plan.reason}"
    total = (plan.memory.total or 0) / 2**30
    time = "" if plan.estimate is None else f", {plan.estimate.seconds:.3g} s a step"
    return f"fits: {total:.1f} GiB a device{time}"


def _seconds(plan: Plan) -> float:
    return math.inf if plan.estimate is None else plan.estimate.seconds


def _topologies(name: str) -> Iterator[Topology]:
    """The topologies that a name stands for, from the smallest."""
    try:
        if name in TOPOLOGIES:
            for size in TOPOLOGIES[name]:
                yield find_topology(f"{name}:{size}")
        elif name.isalnum() and name not in ("cpu", "gpu"):
            raise ValueError(f"there is no TPU {name!r}{did_you_mean(name, TOPOLOGIES)}")
        else:
            yield find_topology(name)
    except ValueError as error:
        raise RefusedError(str(error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What bounds are made of; bytes over all devices together.

    Attributes:
      held: parameters, adapters, the optimizer's state and the gradients.
      weights: the parameters in the dtype of the computation, as they are multiplied.
      gathered: the parameters as they are gathered: those, but quantized kernels as they are held.
      token: one layer's input for one token.
      outputs: of all linear maps of one layer, for one token.
      layers: how many.
    """

    held: int
    weights: int
    gathered: int
    token: int
    outputs: int
    layers: int

    @staticmethod
    def of(config: RunConfig, model: Model) -> "_Sizes":
        spec = config.spec
        dense = model.abstract_params(config.model.dtype)
        params = model.abstract_params(config.model.dtype, config.model.quantization)
        adapter = spec.abstract(params)
        optimizer = abstract_state(adapter.trainable, optimizer_of(config)).opt_state
        gradients = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32"), adapter.trainable
        )
        held = (spec.frozen(params), adapter.trainable, adapter.constant, optimizer, gradients)
        width = model.execution.dtype.itemsize
        kernels = [
            leaf
            for leaf in jax.tree.leaves(dense["layers"])
            if len(leaf.shape) == 3  # [layers, in, out]
        ]
        return _Sizes(
            held=sum(bytes_of(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(held)),
            weights=width * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dense)),
            gathered=sum(
                sum(bytes_of(part.shape, part.dtype) for part in jax.tree.leaves(leaf))
                if isinstance(leaf, QArray)
                else width * math.prod(leaf.shape)
                for leaf in flatten(params).values()
            ),
            token=width * model.config.hidden_size,
            outputs=width * sum(leaf.shape[-1] for leaf in kernels),
            layers=model.config.num_layers,
        )


def _layouts(config: RunConfig, model: Model, sizes: _Sizes, topology: Topology) -> list[Layout]:
    """The layouts that may fit on a topology, the fastest first by a rough count."""
    devices = len(topology.devices)
    limit = topology.chip.memory if topology.chip and topology.chip.memory else math.inf
    found = [
        layout
        for mesh in _meshes(config, model, topology)
        for microbatches in _divisors(config.train.batch_size)
        if (config.train.batch_size // microbatches) % (mesh.slice * mesh.fsdp) == 0
        for remat in REMATS
        if (layout := _bound(config, sizes, mesh, microbatches, remat, devices)).least_bytes < limit
    ]
    return sorted(found, key=lambda layout: layout.cost)


def _meshes(config: RunConfig, model: Model, topology: Topology) -> Iterator[MeshSettings]:
    """The meshes that divide the model: every slice alike, parameters cut over all of it."""
    cut, tokens = model.shardable_sizes(), config.train.max_length
    for fsdp, sequence, tensor in factorizations(len(topology.devices) // topology.slices, 3):
        heads = all(cut[axis] % tensor == 0 for axis in ("heads", "kv_heads", "mlp"))
        if tensor > _LARGEST_TENSOR or not heads or cut["embed"] % fsdp or tokens % sequence:
            continue
        yield MeshSettings(
            slice=topology.slices, data=1, fsdp=fsdp, sequence=sequence, tensor=tensor
        )


def _bound(
    config: RunConfig,
    sizes: _Sizes,
    mesh: MeshSettings,
    microbatches: int,
    remat: str,
    devices: int,
) -> Layout:
    """The least a layout takes, and a rough count of what it costs."""
    tokens = config.train.batch_size // microbatches * config.train.max_length / devices
    kept = sizes.token if remat == "full" else sizes.outputs * (1.0 if remat == "dots" else 2.0)
    # Along "sequence" parameters are repeated.
    held = sizes.held / (mesh.fsdp * mesh.tensor)
    layer = sizes.gathered / sizes.layers / mesh.tensor
    least = held + sizes.layers * tokens * kept + layer
    passes = {"none": 2, "dots": 2, "full": 3}[remat]
    gathered = sizes.gathered / mesh.tensor * passes * microbatches * (1 - 1 / mesh.fsdp)
    everything = config.train.batch_size * config.train.max_length / devices
    exchanged = 4 * sizes.layers * everything * sizes.token * passes * (mesh.tensor - 1)
    # Bytes over links beside products: what a product of a byte of weights and a token takes, in
    # the time that a link takes for a byte, is about 1 / 2000 on TPUs.
    products = sizes.weights * everything * passes / 2000
    cost = products + gathered + exchanged + everything * sizes.token * (mesh.sequence - 1)
    return Layout(mesh=mesh, microbatches=microbatches, remat=remat, least_bytes=least, cost=cost)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
