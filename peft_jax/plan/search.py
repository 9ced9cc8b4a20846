"""Searches the smallest topology that a run fits on, and the best layout on it.

Cheap bounds sort the layouts and exclude those that cannot fit. The compiler decides which fit. On
the smallest topology with a fitting layout, the fastest compiled layout wins, by the estimate of
`peft_jax.plan.estimate`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import jax
from qwix import QArray

from peft_jax.core import did_you_mean, flatten, is_experts, is_stacked
from peft_jax.core.product_names import MLP_INPUT, place_of
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

REMATS = ("none", "products", "attention", "full")
"""Rematerialization settings, in order of recomputation. "dots" saves more than "products", and is
not tried."""
_LARGEST_TENSOR = 16
"""Maximum size of "tensor", above which products are too small for their all-reduces."""
_COMPILED_AT_MOST = 8
"""Maximum number of layouts to compile on one topology."""
_FITTING_ENOUGH = 2
"""Number of fitting layouts after which no more are compiled on a topology."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Mesh, microbatches and rematerialization of a run.

    Attributes:
      mesh: Mesh sizes.
      microbatches: Number of microbatches of a step.
      remat: Rematerialization setting.
      least_bytes: Lower bound of the memory of a device, in bytes.
      cost: Relative time without a unit, for sorting; lower is faster.
    """

    mesh: MeshSettings
    microbatches: int
    remat: str
    least_bytes: float
    cost: float

    def apply(self, config: RunConfig) -> RunConfig:
        """Returns the configuration with this layout."""
        return dataclasses.replace(
            config,
            parallel=self.mesh,
            train=dataclasses.replace(config.train, gradient_accumulation=self.microbatches),
            execution=dataclasses.replace(config.execution, remat=self.remat),
        )

    def flags(self) -> str:
        """Returns the flags that set this layout."""
        sizes = {axis: n for axis, n in self.mesh.sizes.items() if n != 1}
        sizes.setdefault("data", 1)
        flags = [f"--config.parallel.{axis}={size}" for axis, size in sizes.items()]
        flags.append(f"--config.train.gradient_accumulation={self.microbatches}")
        flags.append(f"--config.execution.remat={self.remat}")
        return " ".join(flags)


def search(
    config: RunConfig, name: str, *, say: Callable[[str], None] = lambda message: None
) -> tuple[Plan, Layout | None]:
    """Returns the plan of the best layout on the smallest topology that fits.

    Args:
      config: Configuration of the run. Its mesh, microbatches and rematerialization are searched.
      name: TPU kind, such as "v5p", whose sizes are tried from the smallest; or one topology; or
        "cpu" or "gpu".
      say: Prints each layout that is compiled.

    Returns:
      The plan and its layout. If nothing fits, the last compiled plan and None.

    Raises:
      RefusedError: The name is not known, or no topology divides the model and the batch.
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
            f"no layout on {name} fits this run's arrays and divides the model and"
            f" train.batch_size ({config.train.batch_size}); plan for another --topology, or change"
            " the batch size"
        )
    return last, None


def _outcome(plan: Plan) -> str:
    if not plan.fits:
        return f"no: {plan.reason}"
    total = (plan.memory.total or 0) / 2**30
    time = "" if plan.estimate is None else f", {plan.estimate.seconds:.3g} s/step"
    return f"fits: {total:.1f} GiB per device{time}"


def _seconds(plan: Plan) -> float:
    return math.inf if plan.estimate is None else plan.estimate.seconds


def _topologies(name: str) -> Iterator[Topology]:
    """Yields the topologies of a name, smallest first."""
    try:
        if name in TOPOLOGIES:
            for size in TOPOLOGIES[name]:
                yield find_topology(f"{name}:{size}")
        elif name.isalnum() and name not in ("cpu", "gpu"):
            raise ValueError(
                f"the topology {name!r} is an unknown TPU kind{did_you_mean(name, TOPOLOGIES)}"
            )
        else:
            yield find_topology(name)
    except ValueError as error:
        raise RefusedError(str(error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Sizes for lower bounds, in bytes over all devices.

    Attributes:
      held: Parameters, adapters, optimizer state and gradients.
      weights: Parameters in the compute dtype.
      gathered: Parameters as they are gathered: in the compute dtype, or quantized.
      token: Input of one layer for one token.
      outputs: Outputs of all linear maps of one layer for one token, on average.
      mlp_inputs: Those of them that enter the MLP's nonlinearity.
      mlp_share: Share of the parameters that compute these.
      experts_share: Share of the parameters that belong to experts.
      layers: Number of layers.
    """

    held: int
    weights: int
    gathered: int
    token: int
    outputs: int
    mlp_inputs: int
    mlp_share: float
    experts_share: float
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
        width, layers = model.execution.dtype.itemsize, model.config.num_layers
        axes = flatten(model.logical_axes())
        kernels = {
            path: leaf
            for path, leaf in flatten(dense).items()
            if is_stacked(path) and len(leaf.shape) == 3  # [layers, in, out]
        }
        into_mlp = [leaf for path, leaf in kernels.items() if place_of(axes[path]) == MLP_INPUT]
        weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dense))
        of_experts = [leaf for path, leaf in flatten(dense).items() if is_experts(path)]
        return _Sizes(
            held=sum(bytes_of(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(held)),
            weights=width * weights,
            gathered=sum(
                sum(bytes_of(part.shape, part.dtype) for part in jax.tree.leaves(leaf))
                if isinstance(leaf, QArray)
                else width * math.prod(leaf.shape)
                for leaf in flatten(params).values()
            ),
            token=width * model.config.hidden_size,
            outputs=width * _columns(kernels.values()) // layers,
            mlp_inputs=width * _columns(into_mlp) // layers,
            mlp_share=sum(math.prod(leaf.shape) for leaf in into_mlp) / weights,
            experts_share=sum(math.prod(leaf.shape) for leaf in of_experts) / weights,
            layers=layers,
        )


def _columns(kernels: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Returns the number of columns of kernels [layers, in, out] in all layers."""
    return sum(leaf.shape[0] * leaf.shape[-1] for leaf in kernels)


def _layouts(config: RunConfig, model: Model, sizes: _Sizes, topology: Topology) -> list[Layout]:
    """Returns the layouts that may fit on a topology, fastest first by a rough cost."""
    devices = len(topology.devices)
    limit = topology.chip.memory if topology.chip and topology.chip.memory else math.inf
    found = [
        layout
        for mesh in _meshes(config, model, topology)
        for microbatches in _divisors(config.train.batch_size)
        if (config.train.batch_size // microbatches) % (mesh.slice * mesh.fsdp * mesh.expert) == 0
        for remat in REMATS
        if (layout := _bound(config, sizes, mesh, microbatches, remat, devices)).least_bytes < limit
    ]
    return sorted(found, key=lambda layout: layout.cost)


def _meshes(config: RunConfig, model: Model, topology: Topology) -> Iterator[MeshSettings]:
    """Yields the meshes that divide the model, with parameters sharded over each slice."""
    sizes, tokens = model.shardable_sizes(), config.train.max_length
    chips = len(topology.devices) // topology.slices
    for fsdp, expert, sequence, tensor in factorizations(chips, 4):
        heads = all(sizes.get(axis, 0) % tensor == 0 for axis in ("heads", "kv_heads", "mlp"))
        if tensor > _LARGEST_TENSOR or not heads or sizes["embed"] % fsdp or tokens % sequence:
            continue
        if sizes.get("experts", 0) % (expert * tensor) or (expert > 1 and "experts" not in sizes):
            continue
        yield MeshSettings(
            slice=topology.slices,
            data=1,
            fsdp=fsdp,
            expert=expert,
            sequence=sequence,
            tensor=tensor,
        )


def _bound(
    config: RunConfig,
    sizes: _Sizes,
    mesh: MeshSettings,
    microbatches: int,
    remat: str,
    devices: int,
) -> Layout:
    """Returns a layout with its lower bound of memory and a rough cost."""
    tokens = config.train.batch_size // microbatches * config.train.max_length / devices
    kept = {
        "none": 2 * sizes.outputs,
        "products": sizes.outputs,
        "attention": sizes.outputs - sizes.mlp_inputs,
        "full": sizes.token,
    }[remat]
    # Parameters are replicated along "sequence", and all but those of experts along "expert".
    whole = 1 - sizes.experts_share + sizes.experts_share / mesh.expert
    held = sizes.held * whole / (mesh.fsdp * mesh.tensor)
    layer = sizes.gathered * whole / sizes.layers / mesh.tensor
    least = held + sizes.layers * tokens * kept + layer
    # "products" recomputes what is cheap, which still takes longer than nothing.
    passes = {"none": 2, "products": 2.01, "attention": 2.01 + sizes.mlp_share, "full": 3}[remat]
    gathered = sizes.gathered * whole / mesh.tensor * passes * microbatches * (1 - 1 / mesh.fsdp)
    everything = config.train.batch_size * config.train.max_length / devices
    partners = 2 * (mesh.tensor - 1) + 2 * (mesh.expert * mesh.tensor - 1)
    exchanged = sizes.layers * everything * sizes.token * passes * partners
    # On TPUs, a product of one byte of weights with one token takes about 1 / 2000 of the time that
    # a link takes for one byte.
    products = sizes.weights * everything * passes / 2000
    cost = products + gathered + exchanged + everything * sizes.token * (mesh.sequence - 1)
    return Layout(mesh=mesh, microbatches=microbatches, remat=remat, least_bytes=least, cost=cost)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
